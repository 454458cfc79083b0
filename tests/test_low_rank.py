"""The core: when bases are refit, what the parts are given, what a bad gradient leaves untouched."""

import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import assert_trees_close, assert_trees_equal
from .reference import left_singular_vectors

# float32 against float64 or against a program that rounds differently; a basis refit amplifies it
ROUNDING = 1e-4
SHAPES = {"kernel": (6, 8), "stack": (3, 6, 8)}


def normal(shapes, seed):
    random = np.random.default_rng(seed)
    return {path: jnp.asarray(random.standard_normal(s), jnp.float32) for path, s in shapes.items()}


def gradients(steps, shapes=SHAPES):
    return [normal(shapes, seed) for seed in range(steps)]


def follow(tx, grads, state=None, update=None):
    """All updates and all states, the first of which is the one before the first update."""
    states, history = [tx.init(grads[0]) if state is None else state], []
    update = update or jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, states[-1])
        history.append(updates)
        states.append(state)
    return history, states


def last_fits(states, path):
    """(states, b) counts at the last refit of each matrix of a leaf, -1 where there was none."""
    ages = [(state.count, ol.diagnostics(state)[path].steps_since_refresh) for state in states]
    return np.array([np.where(age < 0, -1, count - 1 - age) for count, age in ages])


def skips(state, path):
    return ol.diagnostics(state)[path].skips.tolist()


def adam(**options):
    return ol.low_rank(optax.scale_by_adam(), rank=2, **{"fit": ol.svd(), **options})


class Seen(NamedTuple):
    extra: Any


def recording(*names, returns=lambda updates: updates):
    """A part whose state is what it was last given under these names."""

    def update(updates, state, params=None, **extra):
        return returns(updates), Seen({name: extra[name] for name in names})

    def like(params, name):
        first = next(iter(params.values()))
        return {
            "rotation": {p: jnp.zeros((*x.shape[:2], x.shape[1])) for p, x in params.items()},
            "refreshed": {p: jnp.array(False) for p in params},
            "value": jnp.zeros((), first.dtype),
        }[name]

    return optax.GradientTransformationExtraArgs(
        lambda params: Seen({name: like(params, name) for name in names}), update
    )


# When


def test_refits_at_multiples_of_the_interval_before_projecting():
    """Every update is P PᵀG with the basis of the gradient at 0, 3, 6, its own there."""
    grads = gradients(8)
    tx = ol.low_rank(optax.identity(), rank=2, fit=ol.svd(), refresh=ol.every(3))
    history, states = follow(tx, grads)
    for step, (grad, updates, state) in enumerate(zip(grads, history, states[1:], strict=True)):
        source = grads[step - step % 3]
        for path in SHAPES:
            layers = np.asarray(grad[path], np.float64).reshape(-1, 6, 8)
            sources = np.asarray(source[path], np.float64).reshape(-1, 6, 8)
            P = np.stack([left_singular_vectors(G, 2) for G in sources])
            np.testing.assert_allclose(state.basis[path], P, rtol=0, atol=ROUNDING)
            want = (P @ P.mT @ layers).reshape(grad[path].shape)
            np.testing.assert_allclose(updates[path], want, rtol=0, atol=10 * ROUNDING)
    assert [int(state.count) for state in states] == list(range(9))


def test_staggered_refits_every_matrix_once_in_each_interval():
    n, steps = 4, 13
    _, states = follow(adam(refresh=ol.every(n, stagger=True)), gradients(steps))
    last = np.concatenate([last_fits(states[1:], path) for path in SHAPES], axis=1)
    fitted = last == np.arange(steps)[:, None]
    assert fitted[0].all()  # nothing can be projected before its first fit
    for start in range(1, steps - n + 1):
        assert (fitted[start : start + n].sum(axis=0) == 1).all()
    assert fitted[1:].sum(axis=1).max() == math.ceil(fitted.shape[1] / n)


def test_interval_may_be_traced():
    grads = gradients(5)

    @jax.jit
    def after(n):
        tx, state = adam(refresh=ol.every(n)), adam().init(grads[0])
        for grad in grads:
            _, state = tx.update(grad, state)
        return state

    last = [last_fits([after(n)], "kernel")[0, 0] for n in (1, 2, 3)]
    assert last == [4, 4, 3]


def constant_basis_fits(policy, scales):
    """Counts at which one matrix is refit, its gradient scaled by these numbers at successive steps."""
    G = normal({"kernel": (6, 8)}, 0)
    tx = ol.low_rank(optax.identity(), rank=2, fit=ol.svd(), refresh=policy)
    grads = [jax.tree.map(lambda g, c=c: c * g, G) for c in scales]
    _, states = follow(tx, grads)
    return sorted(set(last_fits(states[1:], "kernel")[:, 0].tolist()))


def test_on_convergence_waits_for_the_mean_norm_to_fall():
    """The mean of decay 0.9 crosses one half when 0.9^k + 0.01 (1 − 0.9^k) does: k = 7, seen a step later."""
    policy = ol.on_convergence(0.5, min_gap=2, max_gap=50)
    assert constant_basis_fits(policy, [1.0] + 13 * [0.01]) == [0, 8]


def test_on_convergence_keeps_its_gaps():
    policy = ol.on_convergence(0.5, min_gap=2, max_gap=5)
    assert constant_basis_fits(policy, 12 * [1.0]) == [0, 5, 10]
    eager = ol.on_convergence(0.99, min_gap=4, max_gap=50)
    assert constant_basis_fits(eager, [0.5**k for k in range(12)]) == [0, 4, 8]


def test_on_convergence_looks_at_each_matrix():
    """Layer 1 of the stack converges, the others do not."""
    G = normal({"stack": (3, 6, 8)}, 0)["stack"]
    factors = [1.0] + 9 * [0.01]
    grads = [{"stack": G.at[1].multiply(factor)} for factor in factors]
    _, states = follow(adam(refresh=ol.on_convergence(0.5, min_gap=2, max_gap=50)), grads)
    assert last_fits(states, "stack")[-1].tolist() == [0, 8, 0]


def test_on_staleness_refits_when_the_gradient_has_left_the_basis():
    """Captured energy 1, then 0 from step 3 on, which the policy sees at step 4."""
    eye = np.eye(6, 8, dtype=np.float32)
    one, other = eye * (np.arange(8) < 2), eye * (np.arange(8) >= 4)
    grads = [{"kernel": jnp.asarray(one if step < 3 else other)} for step in range(9)]
    tx = adam(refresh=ol.on_staleness(0.5, min_gap=2, max_gap=50))
    _, states = follow(tx, grads)
    assert last_fits(states[1:], "kernel")[:, 0].tolist() == [0] * 4 + [4] * 5
    captured = [float(ol.diagnostics(s)["kernel"].captured_energy[0]) for s in states[1:]]
    np.testing.assert_allclose(captured, 3 * [1] + [0] + 5 * [1], rtol=0, atol=1e-6)


def test_on_staleness_keeps_its_gaps():
    grads = gradients(9, {"kernel": (6, 8)})  # two columns of six never hold 99 % of these
    _, states = follow(adam(refresh=ol.on_staleness(0.99, min_gap=3, max_gap=50)), grads)
    assert last_fits(states[1:], "kernel")[:, 0].tolist() == 3 * [0] + 3 * [3] + 3 * [6]
    _, states = follow(adam(refresh=ol.on_staleness(0.01, min_gap=1, max_gap=4)), grads)
    assert last_fits(states[1:], "kernel")[:, 0].tolist() == 4 * [0] + 4 * [4] + [8]


@pytest.mark.parametrize("make", [ol.on_convergence, ol.on_staleness])
@pytest.mark.parametrize("gaps", [(0, 5), (6, 5)])
def test_policies_say_which_gaps_are_wrong(make, gaps):
    with pytest.raises(ValueError, match=rf"min_gap={gaps[0]} and max_gap={gaps[1]}"):
        make(min_gap=gaps[0], max_gap=gaps[1])


@pytest.mark.parametrize("n", [0, -3])
def test_every_says_what_is_wrong(n):
    with pytest.raises(ValueError, match=rf"positive number of updates, got {n}"):
        ol.every(n)


# What the parts are given


def test_rotation_is_the_identity_until_the_next_refit():
    grads = gradients(4)
    tx = ol.low_rank(recording("rotation", "refreshed"), rank=2, fit=ol.svd(), refresh=ol.every(3))
    _, states = follow(tx, grads)
    for path, shape in SHAPES.items():
        b = math.prod(shape[:-2])
        seen = [jax.tree.map(np.asarray, state.inner.extra) for state in states[1:]]
        assert [bool(s["refreshed"][f"{path}/R"]) for s in seen] == [True, False, False, True]
        rotations = [s["rotation"][f"{path}/R"] for s in seen]
        np.testing.assert_array_equal(rotations[0], np.zeros((b, 2, 2)))  # from no basis at all
        for Q in rotations[1:3]:
            np.testing.assert_array_equal(Q, np.broadcast_to(np.eye(2), (b, 2, 2)))
        old, new = states[3].basis[path], states[4].basis[path]
        np.testing.assert_allclose(rotations[3], new.mT @ old, rtol=0, atol=1e-6)
        assert np.abs(rotations[3]).max() < 0.999  # these gradients share no direction


def test_layers_that_wait_have_the_identity_for_rotation():
    """Staggered layers of one stack: `refreshed` speaks for the leaf, the rotation for each layer."""
    tx = ol.low_rank(
        recording("rotation", "refreshed"),
        rank=2,
        fit=ol.svd(),
        refresh=ol.every(3, stagger=True),
    )
    _, states = follow(tx, gradients(4, {"stack": (3, 6, 8)}))
    fitted = last_fits(states, "stack")[2] == 1
    assert fitted.sum() == 1
    seen = states[2].inner.extra
    assert bool(seen["refreshed"]["stack/R"])
    identity = (np.asarray(seen["rotation"]["stack/R"]) == np.eye(2)).all(axis=(1, 2))
    np.testing.assert_array_equal(identity, ~fitted)


def test_residual_gets_coordinates_steps_and_what_is_left():
    class Given(NamedTuple):
        E: Any
        coords: Any
        steps: Any

    def update(E, state, params=None, *, coords, steps, **extra):
        del state, params, extra
        return jax.tree.map(lambda e: 10 * e, E), Given(E, coords, steps)

    def init(params):
        small = {path: jnp.zeros((x.shape[0], 2, x.shape[2])) for path, x in params.items()}
        return Given(jax.tree.map(lambda x: jnp.zeros(x.shape), params), small, small)

    residual = optax.GradientTransformationExtraArgs(init, update)
    tx = ol.low_rank(optax.scale(-3.0), rank=2, fit=ol.svd(), residual=residual, scale=0.5)
    (grad,) = gradients(1)
    (updates,), (_, state) = follow(tx, [grad])
    for path in SHAPES:
        G, P = np.asarray(grad[path]).reshape(-1, 6, 8), state.basis[path]
        R = P.mT @ G
        given = Given(*(field[f"{path}/R"] for field in state.residual))
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
        close(given.coords, R)
        close(given.steps, -3 * R)
        close(given.E, G - P @ R)
        # `scale` is the subspace step's, the residual brings its own
        close(updates[path].reshape(G.shape), 0.5 * P @ (-3 * R) + 10 * (G - P @ R), atol=1e-4)


def test_extra_arguments_reach_both_parts():
    tx = ol.low_rank(recording("value"), rank=2, fit=ol.svd(), residual=recording("value"))
    (grad,) = gradients(1)
    _, state = tx.update(grad, tx.init(grad), value=jnp.float32(7))
    assert state.inner.extra["value"] == state.residual.extra["value"] == 7


def test_inner_gets_shapes_for_params():
    """Adafactor's factored moments need shapes and nothing else."""
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    history, states = follow(ol.low_rank(inner, rank=3, fit=ol.svd()), gradients(2))
    assert states[-1].inner.v_row["stack/R"].shape == (3, 3)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(history))


# Two sides


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
def test_nesting_projects_both_sides(shape):
    """update = U Adam(UᵀGV) Vᵀ, diagonal at a refresh, with moments of r × r numbers."""
    rank, gap, random = 3, 4, np.random.default_rng(0)
    grads = [{"kernel": jnp.asarray(random.standard_normal(shape), jnp.float32)} for _ in range(7)]
    one_side = functools.partial(ol.low_rank, rank=rank, fit=ol.svd(), refresh=ol.every(gap))
    tx = one_side(one_side(optax.scale_by_adam(), side="long"), scale=0.5)
    history, states = follow(tx, grads)
    assert states[-1].inner.inner.mu["kernel/R/R"].shape == (1, rank, rank)

    M = V2 = np.zeros((rank, rank))
    for t, (grad, updates) in enumerate(zip(grads, history, strict=True)):
        G = np.asarray(grad["kernel"], np.float64)
        if t % gap == 0:
            U, s, Vt = np.linalg.svd(G)
            U, V = U[:, :rank], Vt[:rank].T
            core = np.diag(s[:rank])
            # both bases by the sign rule: moments are kept, so signs matter from one basis to the next
            sides = [X * np.sign(X[np.abs(X).argmax(axis=0), range(rank)]) for X in (U, V)]
            core = sides[0].T @ U @ core @ V.T @ sides[1]
            core[~np.eye(rank, dtype=bool)] = 0
            U, V = sides
        else:
            core = U.T @ G @ V
        M, V2 = 0.9 * M + 0.1 * core, 0.999 * V2 + 0.001 * core**2
        N = M / (1 - 0.9 ** (t + 1)) / (np.sqrt(V2 / (1 - 0.999 ** (t + 1))) + 1e-8)
        want = 0.5 * U @ N @ V.T
        np.testing.assert_allclose(updates["kernel"], want, rtol=0, atol=10 * ROUNDING)


def test_nested_parts_are_given_both_rotations():
    names = ("rotation", "refreshed", "column_rotation", "column_refreshed")
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append({name: jax.tree.map(jnp.shape, extra[name]) for name in names})
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = ol.low_rank(ol.low_rank(inner, rank=2, fit=ol.svd(), side="long"), rank=3, fit=ol.svd())
    follow(tx, gradients(1))
    assert seen[0] == {
        "rotation": {"kernel/R/R": (1, 2, 2), "stack/R/R": (3, 2, 2)},
        "refreshed": {"kernel/R/R": (), "stack/R/R": ()},
        "column_rotation": {"kernel/R/R": (1, 3, 3), "stack/R/R": (3, 3, 3)},
        "column_refreshed": {"kernel/R/R": (), "stack/R/R": ()},
    }


# Bad gradients

WHERE = {"at the first fit": 0, "at a refit": 3, "between refits": 4}


@functools.lru_cache
def guarded():
    """Adam and a residual with a memory, refit at 0, 3, 6; the update; seven good gradients and their run."""
    tx, grads = adam(refresh=ol.every(3), residual=optax.trace(0.9)), gradients(7)
    update = jax.jit(tx.update)
    return tx, update, grads, *follow(tx, grads, update=update)


def of_layer(state, path, layer=slice(None)):
    """Every array that is kept per matrix for this leaf, but the statistics."""
    adam_state = state.inner
    kept = adam_state.mu, adam_state.nu, state.residual.trace
    arrays = state.basis[path], *(moment[f"{path}/R"] for moment in kept)
    return [x[layer] for x in arrays]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("when", WHERE)
def test_matrix_that_is_not_finite_is_skipped(when, bad):
    """One bad entry in layer 1 of the stack: that layer stands still, all else goes on as if nothing was."""
    tx, update, good, want, want_states = guarded()
    step = WHERE[when]
    grads = list(good)
    grads[step] = {**good[step], "stack": good[step]["stack"].at[1, 2, 3].set(bad)}
    history, states = follow(tx, grads, update=update)

    assert not history[step]["stack"][1].any()
    assert_trees_equal(of_layer(states[step + 1], "stack", 1), of_layer(states[step], "stack", 1))
    others = jnp.array([0, 2])
    for got_updates, updates in zip(history, want, strict=True):
        assert_trees_equal(got_updates["kernel"], updates["kernel"])
        assert_trees_equal(got_updates["stack"][others], updates["stack"][others])
    for got, state in zip(states, want_states, strict=True):
        assert_trees_equal(of_layer(got, "stack", others), of_layer(state, "stack", others))
        assert_trees_equal(of_layer(got, "kernel"), of_layer(state, "kernel"))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((history, states)))

    # counted, and a refit that was due is tried again on the next good gradient
    assert skips(states[-1], "stack") == [0, 1, 0]
    assert skips(states[-1], "kernel") == [0]
    refit = step % 3 == 0
    after = last_fits(states, "stack")[step + 2].tolist()
    due = step - step % 3
    assert after == [due, step + 1 if refit else due, due]
    assert last_fits(states, "stack")[-1].tolist() == [6, 6, 6]
    if refit:
        P = left_singular_vectors(np.asarray(good[step + 1]["stack"][1], np.float64), 2)
        got = states[step + 2].basis["stack"][1]
        np.testing.assert_allclose(got, P, rtol=0, atol=ROUNDING)


def test_bad_gradients_twice_in_a_row():
    tx, update, good, *_ = guarded()
    bad = jax.tree.map(lambda g: g * jnp.nan, good[0])
    history, states = follow(tx, [bad, bad, good[0], bad, good[1]], update=update)
    assert last_fits(states, "kernel")[2].tolist() == [-1]
    assert not any(bool(u.any()) for u in jax.tree.leaves(history[:2]))
    assert last_fits(states, "stack")[3].tolist() == [2, 2, 2]
    assert last_fits(states, "stack")[-1].tolist() == [4, 4, 4]  # due at 3
    assert skips(states[-1], "stack") == [3, 3, 3]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((history, states)))


@pytest.mark.parametrize("when", WHERE)
def test_zero_gradient_never_enters_a_basis(when):
    """It is a gradient like any other to Adam, but no reason to forget where gradients were."""
    tx, update, good, *_ = guarded()
    step = WHERE[when]
    grads = list(good)
    grads[step] = jax.tree.map(jnp.zeros_like, good[step])
    history, states = follow(tx, grads, update=update)
    refit = step % 3 == 0
    for path, shape in SHAPES.items():
        np.testing.assert_array_equal(states[step + 1].basis[path], states[step].basis[path])
        mu = [state.inner.mu[f"{path}/R"] for state in states]
        np.testing.assert_allclose(mu[step + 1], 0.9 * mu[step], rtol=1e-6)
        b = math.prod(shape[:-2])
        assert skips(states[-1], path) == [int(refit)] * b
        want = step + 1 if refit else 3
        assert last_fits(states, path)[step + 2].tolist() == [want] * b
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((history, states)))


def test_gradient_whose_square_overflows_is_skipped():
    """1e30 is finite, its square is not, and an infinite second moment would stay for good."""
    tx, update, good, *_ = guarded()
    huge = jax.tree.map(lambda g: 1e30 * g, good[1])
    history, states = follow(tx, [good[0], huge, good[2]], update=update)
    assert not any(bool(u.any()) for u in jax.tree.leaves(history[1]))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((history, states)))


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18])
def test_basis_does_not_depend_on_the_size_of_the_gradient(size):
    (grad,) = gradients(1, {"kernel": (6, 8)})
    tx = ol.low_rank(optax.identity(), rank=2)
    _, (_, want) = follow(tx, [grad])
    _, (_, got) = follow(tx, [jax.tree.map(lambda g: size * g, grad)])
    assert_trees_close(got.basis, want.basis, ROUNDING)


def counting(calls):
    """A fit that appends to a list each time it really runs."""

    def fit(key, G, P):
        jax.debug.callback(lambda _: calls.append(1), G[0, 0])
        return ol.svd()(key, G, P)

    return fit


def test_dead_leaf_never_runs_a_fit():
    calls = []
    grads = [{"kernel": g["kernel"], "stack": 0 * g["stack"]} for g in gradients(7)]
    _, states = follow(adam(fit=counting(calls), refresh=ol.every(3)), grads)
    jax.effects_barrier()
    assert len(calls) == 3  # the kernel's, at 0, 3, 6
    assert last_fits(states, "stack")[-1].tolist() == [-1, -1, -1]


def test_fit_runs_once_a_matrix_that_is_due():
    calls = []
    per_step = []
    tx = adam(fit=counting(calls), refresh=ol.every(4, stagger=True))
    state, update = tx.init(normal(SHAPES, 0)), jax.jit(tx.update)
    for grad in gradients(9):
        _, state = update(grad, state)
        jax.effects_barrier()
        per_step.append(len(calls) - sum(per_step))
    assert per_step == [4, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("fit", [ol.gaussian(), ol.randomized_svd(0, 0)], ids=["gaussian", "svd"])
def test_every_matrix_and_every_refit_has_a_sketch_of_its_own(fit):
    """One gradient in three layers, in two leaves, twice: eight bases, no two alike but for another run's."""
    G = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    grad = {"kernel": jnp.asarray(G), "stack": jnp.stack([jnp.asarray(G)] * 3)}
    tx = adam(fit=fit, refresh=ol.every(1))
    _, (_, *states) = follow(tx, [grad] * 2)
    bases = [P for state in states for path in SHAPES for P in np.asarray(state.basis[path])]
    assert len(bases) == 8
    for P, other in itertools.combinations(bases, 2):
        assert np.abs(P - other).max() > 0.01
    _, again = follow(tx, [grad] * 2)
    assert_trees_equal(again[-1].basis, states[-1].basis)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_bad_gradients_in_a_whole_optimizer(step):
    """Matrix and bias are NaN: parameters and state stay finite, the bias's moments are untouched."""
    params = normal({"kernel": (6, 8), "bias": (8,), "head/kernel": (8, 5)}, 0)
    tx = ol.galore(0.1, rank=2, update_proj_gap=2, weight_decay=0.01)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(5):
        grad = normal({path: x.shape for path, x in params.items()}, 1 + i)
        if i == step:
            grad = {
                **grad,
                "kernel": grad["kernel"] * jnp.inf,
                "bias": grad["bias"].at[3].set(jnp.nan),
            }
        updates, new_state = update(grad, state, params)
        if i == step:
            for path in ("kernel", "bias"):  # the decay goes on
                np.testing.assert_allclose(updates[path], -0.1 * 0.01 * params[path], rtol=1e-5)
            for moment in ("mu", "nu"):
                for old, new in zip(
                    of_bias(state, moment), of_bias(new_state, moment), strict=True
                ):
                    np.testing.assert_array_equal(old, new)
            assert updates["head/kernel"].any()
        params, state = optax.apply_updates(params, updates), new_state
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))


def of_bias(state, moment):
    trees = [tree for _, tree in optax.tree.get_all_with_path(state, moment)]
    found = [
        x for tree in trees for path, x in jax.tree.leaves_with_path(tree) if "bias" in str(path)
    ]
    assert len(found) == 1
    return found


# Errors


@pytest.mark.parametrize(
    ("rank", "error", "words"),
    [
        (0, ValueError, "`rank` must be positive, got 0"),
        (-1, ValueError, "`rank` must be positive, got -1"),
        (2.5, TypeError, r"`rank` must be an int, got 2\.5\. Keep it static"),
        (True, TypeError, "`rank` must be an int, got True"),
    ],
)
@pytest.mark.parametrize("make", [ol.galore, ol.low_rank])
def test_rank_that_is_none(make, rank, error, words):
    first = 0.1 if make is ol.galore else optax.identity()
    with pytest.raises(error, match=words):
        make(first, rank=rank)


def test_side_that_is_none():
    with pytest.raises(ValueError, match='must be "short" or "long", got \'left\''):
        ol.low_rank(optax.identity(), rank=1, side="left")


def test_leaf_without_matrix_view():
    with pytest.raises(
        ValueError, match=r"no matrix view for leaf 'up/bias' of shape \(8,\).*dense="
    ):
        adam().init({"up": {"bias": jnp.ones(8)}})


def test_leaf_that_is_not_real():
    with pytest.raises(TypeError, match=r"real floating-point leaves; leaf 'kernel' is int32"):
        adam().init({"kernel": jnp.ones((6, 8), jnp.int32)})


@pytest.mark.parametrize("make", [ol.galore, ol.assemble])
def test_override_that_matches_nothing(make):
    axes = {"attention/.*": ol.MatrixAxes(0, (1, 2))}
    if make is ol.galore:
        tx = ol.galore(0.1, rank=2, weight_dimension_numbers=axes)
    else:
        tx = ol.assemble(adam(axes=axes), 0.1, rank=2, axes=axes)
    with pytest.raises(ValueError, match=r"'attention/\.\*' match no leaf.*'mlp/kernel'"):
        tx.init({"mlp": {"kernel": jnp.ones((6, 8))}})


def test_inner_that_computes_with_params():
    inner = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    tx = ol.low_rank(inner, rank=2, fit=ol.svd())
    grad = normal(SHAPES, 0)
    with pytest.raises(TypeError, match=r"weight decay outside.*add_decayed_weights"):
        tx.update(grad, tx.init(grad), grad)


def test_tree_that_changed():
    tx, grad = adam(), normal(SHAPES, 0)
    state = tx.init(grad)
    with pytest.raises(
        ValueError, match=r"new are \['other'\], missing are \['stack'\].*Call `init`"
    ):
        tx.update({"kernel": grad["kernel"], "other": grad["stack"]}, state)


def test_paths_that_collide():
    with pytest.raises(ValueError, match=r"path 'a/b'.*Rename"):
        adam().init({"a": {"b": jnp.ones((6, 8))}, "a/b": jnp.ones((6, 8))})


# What is compiled


def test_one_trace_for_a_thousand_steps():
    tx = ol.galore(0.1, rank=1, update_proj_gap=7)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(1000):
        params, state = step(params, state)
    assert len(traces) == 1
    assert int(optax.tree.get(state, "basis")["kernel"].size) == 2
    assert optax.tree.norm(params) < 1  # sin is the gradient of a bowl


def test_rank_is_read_from_the_state():
    """A state with fewer columns than the configuration says just works."""
    grads = gradients(3, {"kernel": (6, 8)})
    want, _ = follow(adam(refresh=ol.every(2)), grads)
    wide = ol.low_rank(optax.scale_by_adam(), rank=4, fit=ol.svd(), refresh=ol.every(2))
    got, _ = follow(wide, grads, state=adam().init(grads[0]))
    assert_trees_equal(got, want)


COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
BRANCHES = re.compile(r"(?:branch_computations=\{[^}]*\}|(?:true|false)_computation=%?[\w.\-]+)")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations)=\{?([^,}\s]+(?:, ?%[^,}\s]+)*)"
)


def compiled_text(tx, shapes, conditionals):
    """Instructions of the compiled update, with those inside conditionals or only those outside."""
    grads = normal(shapes, 0)
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
    bodies, entry = {}, None
    for is_entry, name, body in COMPUTATION.findall(compiled):
        bodies[name] = body
        entry = name if is_entry else entry
    todo, seen = [entry], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        body = bodies[name] if conditionals else BRANCHES.sub("", bodies[name])
        todo += [other for other in bodies if re.search(rf"%?{re.escape(other)}(?![\w.\-])", body)]
    return "\n".join(bodies[name] for name in seen)


FACTORIZATION = r"custom_call_target=\"lapack_\w+"
GRADIENT_SIZED = r"= (?:f32|pred)\[(?:1,)?24,40\]\S* "
PLAIN = {"kernel": (24, 40)}


@pytest.mark.parametrize(
    ("fit", "refresh"),
    [
        (ol.randomized_svd(), ol.every(5)),
        (ol.svd(), ol.every(5, stagger=True)),
        (ol.svd(), ol.on_convergence()),
    ],
    ids=["every", "staggered", "on_convergence"],
)
def test_ordinary_steps_factorize_nothing(fit, refresh):
    tx = ol.low_rank(optax.scale_by_adam(), rank=3, fit=fit, refresh=refresh)
    shapes = {**PLAIN, "stack": (3, 24, 40)}
    assert not re.search(FACTORIZATION, compiled_text(tx, shapes, conditionals=False))
    assert re.search(FACTORIZATION, compiled_text(tx, shapes, conditionals=True))


def test_ordinary_steps_pay_for_two_products_and_no_residual():
    """PᵀG and P N; G − P R and its checks only where a residual is asked for."""
    default = compiled_text(adam(), PLAIN, conditionals=False)
    kept = compiled_text(adam(residual=optax.identity()), PLAIN, conditionals=False)
    assert len(re.findall(r" dot\(", default)) == 2
    assert len(re.findall(r" dot\(", kept)) == 3
    assert not re.search(GRADIENT_SIZED + r"subtract\(", default)
    assert re.search(GRADIENT_SIZED + r"subtract\(", kept)
    assert not re.search(GRADIENT_SIZED + r"(is-finite|select)\(", default)


@pytest.mark.parametrize("watching", [False, True])
def test_only_on_staleness_measures_the_gradient_on_every_step(watching):
    refresh = ol.on_staleness() if watching else ol.on_convergence()
    text = compiled_text(adam(refresh=refresh), PLAIN, conditionals=False)
    squares = re.search(GRADIENT_SIZED + r"multiply\(", text)
    assert bool(squares) == watching


def test_step_that_overflows_is_skipped():
    # the squares of all coordinates are finite, those of one matrix's step are not
    overflow = optax.stateless(lambda u, _: jax.tree.map(lambda x: x * jnp.float32(1e10), u))
    tx = ol.low_rank(optax.chain(optax.trace(0.9), overflow), rank=2, fit=ol.svd())
    grads = {"kernel": jnp.stack([jnp.eye(4, 6), 1e12 * jnp.eye(4, 6)])}
    updates, state = tx.update(grads, tx.init(grads))
    assert not jnp.any(updates["kernel"][1])
    assert not jnp.any(state.inner[0].trace["kernel/R"][1])
    assert ol.diagnostics(state)["kernel"].skips.tolist() == [0, 1]
