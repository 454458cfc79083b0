"""Rotated moments: Adam where nothing rotates, steps no larger than one where everything does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import assert_trees_close, assert_trees_equal

B, R, N = 2, 4, 6
KEY = "kernel/R"


def tree(x):
    return {KEY: jnp.asarray(x, jnp.float32)}


def normal(seed, shape=(B, R, N)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotation(seed, r=R):
    return np.stack([np.linalg.qr(normal(seed + i, (r, r)))[0] for i in range(B)])


IDENTITY = np.broadcast_to(np.eye(R, dtype=np.float32), (B, R, R))


def run(tx, grads, turns=None, state=None):
    """Updates and last state; `turns` are the rotations by step, absent where nothing was refit."""
    update, history = jax.jit(tx.update), []
    state = tx.init(tree(grads[0])) if state is None else state
    for step, grad in enumerate(grads):
        Q = (turns or {}).get(step)
        given = {
            "rotation": tree(IDENTITY if Q is None else Q),
            "refreshed": {KEY: jnp.array(Q is not None)},
        }
        updates, state = update(tree(grad), state, None, **given)
        history.append(updates[KEY])
    return history, state


RULES = ["ldadam", "square", "keep", "reset"]
rotated_adam = functools.partial(ol.scale_by_rotated_adam, b1=0.9, b2=0.99)


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_is_adam_where_nothing_rotates(rule, extra):
    grads = [normal(seed) for seed in range(30)]
    tx = rotated_adam(second_moment=rule)
    if extra:
        got, state = run(tx, grads)
    else:  # outside of `low_rank` nobody gives a rotation
        update, state, got = jax.jit(tx.update), tx.init(tree(grads[0])), []
        for grad in grads:
            updates, state = update(tree(grad), state)
            got.append(updates[KEY])
    plain = optax.scale_by_adam(b1=0.9, b2=0.99)
    want, plain_state = run(optax.with_extra_args_support(plain), grads)
    # 1 − b2^t is accumulated in one and a power in the other, both in float32
    assert_trees_close(got, want, 1e-4)
    assert_trees_close((state.mu, state.nu), (plain_state.mu, plain_state.nu), 1e-4)
    np.testing.assert_allclose(state.mass[KEY], 1 - 0.99**30, rtol=1e-4)


@pytest.mark.parametrize("rule", ["ldadam", "square", "keep"])
def test_turning_by_the_identity_changes_nothing(rule):
    """A refit that finds the old basis."""
    grads = [normal(seed) for seed in range(8)]
    want, want_state = run(rotated_adam(second_moment=rule), grads)
    got, state = run(rotated_adam(second_moment=rule), grads, {3: IDENTITY, 6: IDENTITY})
    # V = w ((v − m²) + m²) / w
    assert_trees_close(got, want, 1e-5)
    assert_trees_close(state, want_state, 1e-5)


def test_permuted_and_flipped_coordinates_permute_the_steps():
    """Q with one ±1 in each row loses nothing: the run goes on as if it had begun in the new coordinates."""
    grads = [normal(seed) for seed in range(8)]
    Q = np.eye(R, dtype=np.float32)[[2, 0, 3, 1]] * np.array([[1], [-1], [1], [-1]], np.float32)
    Q = np.broadcast_to(Q, (B, R, R))
    want, _ = run(rotated_adam(), [Q @ grad for grad in grads])
    got, _ = run(
        rotated_adam(), [grad if t < 4 else Q @ grad for t, grad in enumerate(grads)], {4: Q}
    )
    assert_trees_close(got[4:], want[4:], 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_first_moment_moves_with_the_basis(rule):
    """P_new M_new = P_old M_old where the new basis spans the old one: Q M, exactly."""
    grads, Q = [normal(seed) for seed in range(5)], rotation(7)
    _, before = run(rotated_adam(second_moment=rule), grads[:4])
    _, after = run(rotated_adam(second_moment=rule), grads, {4: Q})
    want = 0.9 * Q @ before.mu[KEY] + 0.1 * grads[4]
    np.testing.assert_allclose(after.mu[KEY], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_second_moment_is_never_negative(rule):
    """Q V itself, which the paper prints, is negative in places; none of the rules is."""
    grads, turns = [normal(seed) for seed in range(12)], {t: rotation(3 * t) for t in (3, 5, 9)}
    _, before = run(rotated_adam(second_moment=rule), grads[:9], {3: turns[3], 5: turns[5]})
    assert (turns[9] @ before.nu[KEY]).min() < 0
    history, state = run(rotated_adam(second_moment=rule), grads, turns)
    assert state.nu[KEY].min() >= 0
    assert all(np.isfinite(step).all() for step in history)


NOTHING_KEPT = np.zeros((B, R, R), np.float32)


@pytest.mark.parametrize("age", [0, 3, 5000])
def test_steps_stay_below_one_after_a_refit_to_a_disjoint_subspace(age):
    """A constant gradient in coordinates the old basis did not have: Q = 0, however old the run is."""
    tx = ol.scale_by_rotated_adam()
    state = tx.init(tree(normal(0)))
    old = tree(1 + normal(1) ** 2)
    mass = jax.tree.map(lambda w: w + 1 - 0.999**age, state.mass)
    state = state._replace(count=state.count + age, mu=old, nu=old, mass=mass)
    history, _ = run(tx, 60 * [normal(0)], {0: NOTHING_KEPT}, state=state)
    # |m̂| ≤ max |g| while v̂ = g²; the rest is round-off
    assert max(np.abs(step).max() for step in history) <= 1.05


def test_plain_adam_takes_steps_of_six_there():
    """What the mass is for: (1 − 0.9^k) / √(1 − 0.999^k) = 6.6 at k = 12 if all corrections are over."""
    tx = optax.with_extra_args_support(optax.scale_by_adam())
    state = tx.init(tree(normal(0)))
    history, _ = run(tx, 60 * [normal(0)], state=state._replace(count=state.count + 5000))
    assert max(np.abs(step).max() for step in history) > 6


def test_first_refit_of_all_starts_from_nothing():
    """At step 0 the old basis is zero, so Q is: the same steps as without a refit."""
    grads = [normal(seed) for seed in range(5)]
    want, _ = run(rotated_adam(), grads)
    got, _ = run(rotated_adam(), grads, {0: NOTHING_KEPT})
    assert_trees_equal(got, want)


def test_columns_turn_inside_a_nested_projection():
    """M ← Q M Kᵀ, and a permutation of the columns permutes the steps."""
    grads = [normal(seed) for seed in range(6)]
    K = np.broadcast_to(np.eye(N, dtype=np.float32)[[1, 2, 0, 5, 3, 4]], (B, N, N))
    tx = rotated_adam()
    update, state, got = jax.jit(tx.update), tx.init(tree(grads[0])), []
    for t, grad in enumerate(grads):
        extra = {
            "rotation": tree(IDENTITY),
            "refreshed": {KEY: jnp.array(False)},
            "column_rotation": tree(K if t == 3 else np.broadcast_to(np.eye(N), (B, N, N))),
            "column_refreshed": {KEY: jnp.array(t == 3)},
        }
        grad = grad @ K.mT if t >= 3 else grad
        updates, state = update(tree(grad), state, None, **extra)
        got.append(updates[KEY])
    want, _ = run(tx, [grad @ K.mT for grad in grads])
    assert_trees_close(got[3:], want[3:], 1e-5)


def test_first_moment_may_be_bfloat16():
    _, state = run(rotated_adam(mu_dtype=jnp.bfloat16), [normal(0), normal(1)], {1: rotation(2)})
    assert state.mu[KEY].dtype == jnp.bfloat16
    assert state.nu[KEY].dtype == state.mass[KEY].dtype == jnp.float32


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"must be one of \('ldadam', .*got 'linear'"):
        ol.scale_by_rotated_adam(second_moment="linear")


# Other transformations

OTHERS = {
    "lion": (optax.scale_by_lion, "mu"),
    "momentum": (functools.partial(optax.trace, 0.9), "trace"),
    "rms": (optax.scale_by_rms, "nu"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rotated_turns_the_state_before_the_update(name):
    make, field = OTHERS[name]
    inner, Q = make(), rotation(5)
    grads = [normal(seed) for seed in range(4)]
    _, before = run(optax.with_extra_args_support(inner), grads[:3])
    moment = getattr(before, field)[KEY]
    turned = np.square(Q) @ moment if field == "nu" else Q @ moment
    want, want_state = inner.update(tree(grads[3]), before._replace(**{field: tree(turned)}))
    history, state = run(ol.rotated(inner), grads, {3: Q})
    assert_trees_close(tree(history[3]), want, 1e-4)
    assert_trees_close(state, want_state, 1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_rotated_is_the_inner_transformation_where_nothing_rotates(name):
    inner = OTHERS[name][0]()
    grads = [normal(seed) for seed in range(4)]
    want, want_state = run(optax.with_extra_args_support(inner), grads)
    got, state = run(ol.rotated(inner), grads)
    assert_trees_equal(got, want)
    assert_trees_equal(state, want_state)


def test_rotated_looks_into_chains():
    inner, Q = optax.chain(optax.trace(0.9), optax.scale(-2.0)), rotation(5)
    grads = [normal(seed) for seed in range(3)]
    history, state = run(ol.rotated(inner), grads, {2: Q})
    trace = 0.9 * Q @ (0.9 * grads[0] + grads[1]) + grads[2]
    np.testing.assert_allclose(state[0].trace[KEY], trace, rtol=0, atol=1e-5)
    np.testing.assert_allclose(history[2], -2 * trace, rtol=0, atol=1e-5)


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("inner", ["momentum", "adam"])
def test_inside_low_rank_the_first_moment_stays_where_it_was(inner, two_sided):
    """Gradients in one pair of subspaces, refit at every step: P M (VᵀV) is the full momentum throughout."""
    random = np.random.default_rng(0)
    U, V = random.standard_normal((6, 2)), random.standard_normal((2, 9))
    grads = [U @ random.standard_normal((2, 2)) @ V for _ in range(5)]
    grads = [{"kernel": jnp.asarray(grad, jnp.float32)} for grad in grads]
    part = {"momentum": ol.rotated(optax.trace(0.9)), "adam": ol.scale_by_rotated_adam()}[inner]
    project = functools.partial(ol.low_rank, rank=2, fit=ol.svd(), refresh=ol.every(1))
    tx = project(project(part, side="long")) if two_sided else project(part)
    state, update, momentum = tx.init(grads[0]), jax.jit(tx.update), np.zeros((6, 9))
    for grad in grads:
        _, state = update(grad, state)
        moments = state.inner.inner if two_sided else state.inner
        (M,) = jax.tree.leaves(moments.trace if inner == "momentum" else moments.mu)
        M = (state.inner.basis["kernel/R"][0] @ M[0]).T if two_sided else M[0]
        share = 1.0 if inner == "momentum" else 0.1
        momentum = 0.9 * momentum + share * np.asarray(grad["kernel"], np.float64)
        lifted = state.basis["kernel"][0] @ M
        # float32 bases, five of them
        np.testing.assert_allclose(lifted, momentum, rtol=0, atol=1e-4 * np.abs(momentum).max())
