"""Rotated moments: Adam where nothing rotates, steps no larger than one where everything does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol
from optax_lowrank.rules import as_rule

from .helpers import assert_trees_close, assert_trees_equal

R, N = 4, 6
IDENTITY = np.eye(R, dtype=np.float32)


def normal(seed, shape=(R, N)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rotation(seed):
    return np.linalg.qr(normal(seed, (R, R)))[0]


def run(rule, grads, turns=None, state=None):
    """Steps and last state; `turns` are the changes of basis by step, absent where nothing was refit."""
    rule, history = as_rule(rule), []
    step, turn = jax.jit(lambda G, state: rule.step(G, None, state)), jax.jit(rule.turn)
    state = rule.init(jnp.zeros((R, N))) if state is None else state
    for t, grad in enumerate(grads):
        if t in (turns or {}):
            Q, K = turns[t] if isinstance(turns[t], tuple) else (turns[t], None)
            state = turn(state, ol.Turn(jnp.asarray(Q), None if K is None else jnp.asarray(K)))
        A, c, state = step(jnp.asarray(grad), state)
        assert c is None
        history.append(A)
    return history, state


SECOND_MOMENTS = ["ldadam", "square", "keep", "reset"]
rotated_adam = functools.partial(ol.scale_by_rotated_adam, b1=0.9, b2=0.99)


@pytest.mark.parametrize("second", SECOND_MOMENTS)
def test_is_adam_where_nothing_rotates(second):
    grads = [normal(seed) for seed in range(30)]
    got, state = run(rotated_adam(second_moment=second), grads)
    want, plain = run(optax.scale_by_adam(b1=0.9, b2=0.99), grads)
    # 1 − b2^t is accumulated in one and a power in the other, both in float32
    assert_trees_close(got, want, 1e-4)
    assert_trees_close((state.mu, state.nu), (plain.mu, plain.nu), 1e-4)
    np.testing.assert_allclose(state.mass, 1 - 0.99**30, rtol=1e-4)


@pytest.mark.parametrize("second", ["ldadam", "square", "keep"])
def test_turning_by_the_identity_changes_nothing(second):
    """A refit that finds the old basis."""
    grads = [normal(seed) for seed in range(8)]
    want, want_state = run(rotated_adam(second_moment=second), grads)
    got, state = run(rotated_adam(second_moment=second), grads, {3: IDENTITY, 6: IDENTITY})
    # V = w ((v − m²) + m²) / w
    assert_trees_close(got, want, 1e-5)
    assert_trees_close(state, want_state, 1e-5)


FLIPPED = IDENTITY[[2, 0, 3, 1]] * np.array([[1], [-1], [1], [-1]], np.float32)
COLUMNS = np.eye(N, dtype=np.float32)[[1, 2, 0, 5, 3, 4]]


@pytest.mark.parametrize(
    ("Q", "K"), [(FLIPPED, None), (IDENTITY, COLUMNS), (FLIPPED, COLUMNS)], ids=["Q", "K", "QK"]
)
def test_permuted_and_flipped_coordinates_permute_the_steps(Q, K):
    """One ±1 in each row loses nothing: the run goes on as if it had begun in the new coordinates."""
    grads = [normal(seed) for seed in range(8)]
    new = [Q @ grad if K is None else Q @ grad @ K.T for grad in grads]
    want, _ = run(rotated_adam(), new)
    got, _ = run(rotated_adam(), grads[:4] + new[4:], {4: (Q, K)})
    assert_trees_close(got[4:], want[4:], 1e-5)


@pytest.mark.parametrize("second", SECOND_MOMENTS)
def test_first_moment_moves_with_the_basis(second):
    """P_new M_new = P_old M_old where the new basis spans the old one: Q M, exactly."""
    grads, Q = [normal(seed) for seed in range(5)], rotation(7)
    _, before = run(rotated_adam(second_moment=second), grads[:4])
    _, after = run(rotated_adam(second_moment=second), grads, {4: Q})
    want = 0.9 * Q @ before.mu + 0.1 * grads[4]
    np.testing.assert_allclose(after.mu, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("second", SECOND_MOMENTS)
def test_second_moment_is_never_negative(second):
    """Q V itself, which the paper prints, is negative in places; none of the rules is."""
    grads, turns = [normal(seed) for seed in range(12)], {t: rotation(3 * t) for t in (3, 5, 9)}
    _, before = run(rotated_adam(second_moment=second), grads[:9], turns)
    assert (turns[9] @ before.nu).min() < 0
    history, state = run(rotated_adam(second_moment=second), grads, turns)
    assert state.nu.min() >= 0
    assert all(np.isfinite(step).all() for step in history)


NOTHING_KEPT = np.zeros((R, R), np.float32)


@pytest.mark.parametrize("age", [0, 3, 5000])
def test_steps_stay_below_one_after_a_refit_to_a_disjoint_subspace(age):
    """A constant gradient in coordinates the old basis did not have: Q = 0, however old the run is."""
    rule = ol.scale_by_rotated_adam()
    state, old = rule.init(jnp.zeros((R, N))), jnp.asarray(1 + normal(1) ** 2)
    state = state._replace(
        count=state.count + age, mu=old, nu=old, mass=state.mass + 1 - 0.999**age
    )
    history, _ = run(rule, 60 * [normal(0)], {0: NOTHING_KEPT}, state=state)
    # |m̂| ≤ max |g| while v̂ = g²; the rest is round-off
    assert max(np.abs(step).max() for step in history) <= 1.05


def test_plain_adam_takes_steps_of_six_there():
    """What the mass is for: (1 − 0.9^k) / √(1 − 0.999^k) = 6.6 at k = 12 if all corrections are over."""
    tx = optax.scale_by_adam()
    state = tx.init(jnp.zeros((R, N)))
    history, _ = run(tx, 60 * [normal(0)], state=state._replace(count=state.count + 5000))
    assert max(np.abs(step).max() for step in history) > 6


def test_first_refit_of_all_starts_from_nothing():
    """At step 0 the old basis is zero, so Q is: the same steps as without a refit."""
    grads = [normal(seed) for seed in range(5)]
    want, _ = run(rotated_adam(), grads)
    got, _ = run(rotated_adam(), grads, {0: NOTHING_KEPT})
    assert_trees_equal(got, want)


def test_first_moment_may_be_bfloat16():
    _, state = run(rotated_adam(mu_dtype=jnp.bfloat16), [normal(0), normal(1)], {1: rotation(2)})
    assert state.mu.dtype == jnp.bfloat16
    assert state.nu.dtype == state.mass.dtype == jnp.float32


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
def test_rotated_turns_the_state_before_the_step(name):
    make, field = OTHERS[name]
    inner, Q = make(), rotation(5)
    grads = [normal(seed) for seed in range(4)]
    _, before = run(inner, grads[:3])
    moment = getattr(before, field)
    turned = np.square(Q) @ moment if field == "nu" else Q @ moment
    want, want_state = inner.update(jnp.asarray(grads[3]), before._replace(**{field: turned}))
    history, state = run(ol.rotated(inner), grads, {3: Q})
    assert_trees_close(history[3], want, 1e-4)
    assert_trees_close(state, want_state, 1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_rotated_is_the_inner_transformation_where_nothing_rotates(name):
    inner, grads = OTHERS[name][0](), [normal(seed) for seed in range(4)]
    assert_trees_equal(run(ol.rotated(inner), grads), run(inner, grads))


def test_rotated_looks_into_chains():
    inner, Q = optax.chain(optax.trace(0.9), optax.scale(-2.0)), rotation(5)
    grads = [normal(seed) for seed in range(3)]
    history, state = run(ol.rotated(inner), grads, {2: Q})
    trace = 0.9 * Q @ (0.9 * grads[0] + grads[1]) + grads[2]
    np.testing.assert_allclose(state[0].trace, trace, rtol=0, atol=1e-5)
    np.testing.assert_allclose(history[2], -2 * trace, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["short", "both"])
@pytest.mark.parametrize("inner", ["momentum", "adam"])
def test_inside_low_rank_the_first_moment_stays_where_it_was(inner, side):
    """Gradients in one pair of subspaces, refit at every step: P M, or P M Kᵀ, is the full momentum throughout."""
    random = np.random.default_rng(0)
    U, V = random.standard_normal((6, 2)), random.standard_normal((2, 9))
    grads = [U @ random.standard_normal((2, 2)) @ V for _ in range(5)]
    grads = [{"kernel": jnp.asarray(grad, jnp.float32)} for grad in grads]
    rule = {"momentum": ol.rotated(optax.trace(0.9)), "adam": ol.scale_by_rotated_adam()}[inner]
    tx = ol.low_rank(rule, rank=2, fit=ol.svd(), refresh=ol.every(1), side=side)
    state, update, momentum = tx.init(grads[0]), jax.jit(tx.update), np.zeros((6, 9))
    for grad in grads:
        _, state = update(grad, state)
        basis, moments, _ = state.leaves["kernel"]
        M = moments.trace[0] if inner == "momentum" else moments.mu[0]
        share = 1.0 if inner == "momentum" else 0.1
        momentum = 0.9 * momentum + share * np.asarray(grad["kernel"], np.float64)
        lifted = basis.P[0] @ M @ basis.K[0].T if side == "both" else basis[0] @ M
        # float32 bases, five of them
        np.testing.assert_allclose(lifted, momentum, rtol=0, atol=1e-4 * np.abs(momentum).max())


def test_of_a_single_coordinate_too_both_sides_turn():
    """A moment of 1 × 1 is no mass, which has one number a row and no columns to turn."""
    turns = {1: (np.full((1, 1), 0.5, np.float32), np.full((1, 1), 0.25, np.float32))}
    rule, state = ol.scale_by_rotated_adam(), None
    grads = [normal(seed, (1, 1)) for seed in range(2)]
    state = rule.init(jnp.zeros((1, 1)))
    _, state = run(rule, grads, turns, state)
    np.testing.assert_allclose(
        state.mu, 0.9 * 0.5 * (0.1 * grads[0]) * 0.25 + 0.1 * grads[1], rtol=1e-6
    )
    np.testing.assert_allclose(state.mass, 0.999 * 0.25 * 1e-3 + 1e-3, rtol=1e-4)
