"""The core: when bases are refit, what the parts are given, what a bad gradient leaves untouched."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol
from optax_lowrank.rules import as_rule

from .helpers import (
    assert_trees_close,
    assert_trees_equal,
    factorizations,
    low_rank_state,
    run,
)
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
            np.testing.assert_allclose(state.leaves[path].basis, P, rtol=0, atol=ROUNDING)
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


def recording(**options):
    """A rule whose state is what it was last told of: coordinates, squared lengths, the turn, an extra argument."""

    def init(R):
        r, n = R.shape
        return {"R": R, "columns": jnp.zeros(n), "Q": jnp.zeros((r, r)), "value": jnp.zeros(())}

    def turn(state, turn):
        return state | {"Q": turn.Q}

    def step(R, columns, state, *, value=0.0, **extra):
        assert extra.keys() == {"count", "size", "finite"}
        kept = {"R": R, "columns": columns, "value": jnp.asarray(value, jnp.float32)}
        return R, None, state | kept

    return ol.low_rank(ol.Rule(init, turn, step), rank=2, fit=ol.svd(), **options)


def test_a_rule_turns_where_its_matrix_is_refit_and_nowhere_else():
    """Staggered layers of a stack: at step 1 one of them has P_newᵀ P_old, the others still what they got at step 0."""
    tx = recording(refresh=ol.every(3, stagger=True))
    _, states = follow(tx, gradients(4, {"stack": (3, 6, 8)}))
    bases = [state.leaves["stack"].basis for state in states]
    Q = [state.leaves["stack"].rule["Q"] for state in states]
    np.testing.assert_array_equal(Q[1], np.zeros((3, 2, 2)))  # from no basis at all
    fitted = np.diff(last_fits(states, "stack"), axis=0) > 0
    assert fitted.sum(axis=1).tolist() == [3, 1, 1, 1]
    for t in range(1, 4):
        want = jnp.where(fitted[t][:, None, None], bases[t + 1].mT @ bases[t], Q[t])
        np.testing.assert_allclose(Q[t + 1], want, rtol=0, atol=1e-6)
        assert np.abs(Q[t + 1]).max() < 0.999  # these gradients share no direction


def test_what_a_rule_is_told():
    (grad,) = gradients(1)
    tx = recording(scale=0.5)
    updates, state = jax.jit(tx.update)(grad, tx.init(grad), value=jnp.float32(7))
    for path in SHAPES:
        G, (P, told, _) = np.asarray(grad[path]).reshape(-1, 6, 8), state.leaves[path]
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
        close(told["R"], P.mT @ G)
        close(told["columns"], np.square(G).sum(axis=1))
        close(updates[path].reshape(G.shape), 0.5 * P @ (P.mT @ G))
        assert told["value"].tolist() == [7] * len(G)


def test_inner_gets_shapes_for_params():
    """Adafactor's factored moments need shapes and nothing else."""
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    history, states = follow(ol.low_rank(inner, rank=3, fit=ol.svd()), gradients(2))
    assert states[-1].leaves["stack"].rule.v_row.shape == (3, 3)
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(history))


# Two sides


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)], ids=str)
def test_both_sides_are_projected(shape):
    """update = U Adam(UᵀGV) Vᵀ, diagonal at a refresh, with moments of r × r numbers."""
    rank, gap, random = 3, 4, np.random.default_rng(0)
    grads = [{"kernel": jnp.asarray(random.standard_normal(shape), jnp.float32)} for _ in range(7)]
    options = {"rank": rank, "fit": ol.svd(), "refresh": ol.every(gap)}
    tx = ol.low_rank(optax.scale_by_adam(), **options, side="both", scale=0.5)
    history, states = follow(tx, grads)
    assert states[-1].leaves["kernel"].rule.mu.shape == (1, rank, rank)

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


# Bad gradients

WHERE = {"at the first fit": 0, "at a refit": 3, "between refits": 4}


@functools.lru_cache
def guarded():
    """Adam's step and momentum for weights, refit at 0, 3, 6; the update; seven good gradients and their run."""
    moments = as_rule(optax.scale_by_adam())

    def step(R, columns, state, **extra):
        N, _, adam_state = moments.step(R, None, state[0], **extra)
        c = 0.9 * state[1] + jnp.sqrt(columns)
        return N, c, (adam_state, c)

    rule = ol.Rule(lambda R: (moments.init(R), R[0]), lambda state, turn: state, step)
    tx, grads = ol.low_rank(rule, rank=2, fit=ol.svd(), refresh=ol.every(3)), gradients(7)
    update = jax.jit(tx.update)
    return tx, update, grads, *follow(tx, grads, update=update)


def of_layer(state, path, layer=slice(None)):
    """Every array that is kept per matrix for this leaf, but the statistics."""
    return [x[layer] for x in jax.tree.leaves(state.leaves[path])]


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
        got = states[step + 2].leaves["stack"].basis[1]
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
        bases = [state.leaves[path].basis for state in states]
        np.testing.assert_array_equal(bases[step + 1], bases[step])
        mu = [state.leaves[path].rule[0].mu for state in states]
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
    assert_trees_close(got.leaves["kernel"].basis, want.leaves["kernel"].basis, ROUNDING)


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
    bases = [P for state in states for path in SHAPES for P in np.asarray(state.leaves[path].basis)]
    assert len(bases) == 8
    for P, other in itertools.combinations(bases, 2):
        assert np.abs(P - other).max() > 0.01
    _, again = follow(tx, [grad] * 2)
    assert_trees_equal(again[-1].leaves, states[-1].leaves)


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
            assert not updates["kernel"].any()  # nor decays
            assert not updates["bias"].any()
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


# Bad fits

BAD_FITS = {
    "not finite": lambda P: P.at[2, 1].set(jnp.nan),
    "infinite": lambda P: P.at[2, 1].set(jnp.inf),
    "long": lambda P: 2 * P,
    "skew": lambda P: P.at[:, 1].add(0.1 * P[:, 0]),
    "repeated": lambda P: P.at[:, 1].set(P[:, 0]),
}


@pytest.mark.parametrize(("wrong", "side"), [*((w, "short") for w in BAD_FITS), ("long", "both")])
def test_what_a_fit_returns_is_stored_only_if_it_is_a_basis(wrong, side):
    """Else the old one stays, and what the rule keeps with it; the refit is tried again, and the skip is counted."""

    def fit(key, G, P):
        P = ol.svd()(key, G, P)
        return (
            BAD_FITS[wrong](P) if side == "short" or G.shape[0] == 8 else P
        )  # or only that of the other side

    options = {"rank": 2, "refresh": ol.every(2), "side": side}
    good, bad = (
        jax.jit(ol.low_rank(ol.rotated(optax.trace(0.9)), fit=x, **options).update)
        for x in (ol.svd(), fit)
    )
    grads = gradients(4, {"stack": (3, 6, 8)})
    state = ol.low_rank(ol.rotated(optax.trace(0.9)), fit=fit, **options).init(grads[0])
    nothing, (_, *states) = follow(None, grads[:1], state, bad)
    assert not nothing[0]["stack"].any()
    assert last_fits(states, "stack")[-1].tolist() == [-1, -1, -1]
    assert skips(states[-1], "stack") == [1, 1, 1]

    _, states = follow(None, grads[:2], state, good)
    updates, late = follow(None, grads[2:3], states[-1], bad)
    before, after = (x[-1].leaves["stack"] for x in (states, late))
    assert_trees_equal(after.basis, before.basis)
    assert last_fits(late, "stack")[-1].tolist() == [0, 0, 0]
    assert skips(late[-1], "stack") == [1, 1, 1]
    lift = lambda x: (
        x.basis.P @ x.rule.trace @ x.basis.K.mT if side == "both" else x.basis @ x.rule.trace
    )
    np.testing.assert_allclose(updates[0]["stack"], lift(after), rtol=0, atol=1e-5)

    _, done = follow(None, grads[3:], late[-1], good)
    assert last_fits(done, "stack")[-1].tolist() == [3, 3, 3]
    assert skips(done[-1], "stack") == [1, 1, 1]


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
    with pytest.raises(ValueError, match='"short", "long" or "both", got \'left\''):
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
    with pytest.raises(TypeError, match="unsupported operand") as error:
        tx.update(grad, tx.init(grad), grad)
    assert "Put what computes with weights (decay" in error.value.__notes__[0]


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
    assert low_rank_state(state).leaves["kernel"].basis.size == 2
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


@functools.cache
def compiled_update(tx, shapes, dtype):
    grads = jax.tree.map(lambda x: x.astype(dtype), normal(dict(shapes), 0))
    return jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()


def compiled_text(tx, shapes, conditionals, dtype=jnp.float32):
    """Instructions of the compiled update, with those inside conditionals or only those outside."""
    compiled = compiled_update(tx, tuple(shapes.items()), dtype)
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


def test_refits_of_several_widths_are_one_program():
    def count(*shapes, **arguments):
        tx = ol.low_rank(optax.scale_by_adam(), rank=3, **arguments)
        params = {f"{m}x{n}": jnp.ones((m, n)) for m, n in shapes}
        return len(list(factorizations(jax.make_jaxpr(tx.update)(params, tx.init(params)))))

    for side in ("short", "both"):
        wide = count((24, 40), side=side)
        assert count((24, 40), (24, 24), (64, 24), (24, 28), side=side) == wide > 0
        # filled up to more than four times its size, a narrow one would pay for a wide one
        assert count((24, 40), (24, 100), side=side) == 2 * wide
    # the fit needs the gradient as it is
    assert count((24, 40), (24, 24), fit=ol.svd()) == 2 * count((24, 40), fit=ol.svd())


@pytest.mark.parametrize(
    ("fit", "store"),
    [
        (ol.randomized_svd(), ol.InDtype()),
        (ol.subspace_iteration(), ol.InCodes(8)),
        (ol.subspace_iteration(), ol.InCodes(4)),
    ],
    ids=["floats", "8 bits", "4 bits"],
)
def test_a_refit_beside_wider_matrices_is_that_of_the_matrix_alone(fit, store):
    shapes = {"narrow": (16, 20), "odd": (16, 27), "wide": (2, 16, 60), "flipped": (44, 16)}
    tx = ol.low_rank(
        optax.identity(), rank=3, fit=fit, refresh=ol.every(2), side="both", basis_store=store
    )
    random = np.random.default_rng(0)

    def strong(*batch, m, n):  # in three directions, which round-off cannot exchange for others
        U, V = random.standard_normal((*batch, m, 3)), random.standard_normal((*batch, 3, n))
        return jnp.asarray(U @ V, jnp.float32)

    trees = [
        {name: strong(*batch, m=m, n=n) for name, (*batch, m, n) in shapes.items()}
        for _ in range(4)
    ]
    _, _, together = run(tx, trees[0], trees)
    for name in ("narrow", "odd"):
        only = [{name: tree[name]} for tree in trees]
        _, _, alone = run(tx, only[0], only)
        for got, want in zip(together, alone, strict=True):
            error = jnp.linalg.norm(got[name] - want[name]) / jnp.linalg.norm(want[name])
            assert error < 1e-3


def test_ordinary_steps_pay_for_two_products():
    """PᵀG and P A, whether columns of the gradient are weighed or not; what is weighed is not subtracted from."""
    weighs = ol.Rule(
        lambda R: (),
        lambda state, turn: state,
        lambda R, columns, state: (-R, jnp.sqrt(columns), state),
    )
    for rule in (optax.scale_by_adam(), weighs):
        tx = ol.low_rank(rule, rank=2, fit=ol.svd())
        text = compiled_text(tx, PLAIN, conditionals=False)
        assert len(re.findall(r" dot\(", text)) == 2
        assert not re.search(GRADIENT_SIZED + r"subtract\(", text)
        assert bool(re.search(GRADIENT_SIZED + r"multiply\(", text)) == (rule is weighs)
        # of a narrow basis, what weighs columns needs PᵀP R as well
        narrow = compiled_text(tx, PLAIN, conditionals=False, dtype=jnp.bfloat16)
        assert len(re.findall(r" dot\(", narrow)) == (4 if rule is weighs else 2)


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
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert not jnp.any(updates["kernel"][1])
    assert not jnp.any(state.leaves["kernel"].rule[0].trace[1])
    assert ol.diagnostics(state)["kernel"].skips.tolist() == [0, 1]
