"""Natural GaLore: the preconditioner against the dense inverse, its history, its bytes."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import assert_trees_close, assert_trees_equal, run, turning_gradients
from .reference import natural_galore as reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
# float32 sums of some ten products, and a solve with a small condition number
ROUNDING = 1e-5


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def follow(tx, grads):
    """Updates and states, the first included, along these gradients."""
    state, update = tx.init(jax.tree.map(jnp.asarray, grads[0])), jitted(tx)
    updates, states = [], [state]
    for grad in grads:
        out, state = update(grad, state)
        updates.append(out)
        states.append(state)
    return updates, states


@functools.cache
def jitted(tx):
    return jax.jit(tx.update)


fisher = functools.cache(ol.scale_by_woodbury_fisher)


def dense(past, damping):
    """(λI + H Hᵀ)⁻¹ g of the last gradient in `past`, in float64."""
    H = np.stack([np.asarray(g, np.float64).ravel() for g in past], axis=1)
    F = damping * np.eye(len(H)) + H @ H.T
    return np.linalg.solve(F, H[:, -1]).reshape(np.shape(past[-1]))


def assert_follows(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# The trajectory


def trajectory(tx, grads):
    params = {"kernel": jnp.zeros(grads.shape[1:])}
    _, _, updates = run(tx, params, [{"kernel": jnp.asarray(grad)} for grad in grads])
    return np.stack([u["kernel"] for u in updates])


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_golden_trace(shape):
    """Over two refreshes. 2e-3: five times what a literal transcription in float32 is off by."""
    trace = np.load(GOLDEN / f"natural_{shape}.npz")
    tx = ol.natural_galore(1.0, fit=ol.svd(), **json.loads(str(trace["config"])))
    assert_follows(trajectory(tx, trace["grads"]), trace["updates"], 2e-3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)], ids=str)
def test_reference_on_other_gradients(shape):
    """Slowly turning gradients, and any hyperparameters; gaps in the spectrum keep SVDs comparable."""
    grads = turning_gradients(shape).astype(np.float32)
    config = {"rank": 4, "update_proj_gap": 5, "scale": 0.7, "learning_rate": 0.03, "history": 3}
    config |= {"damping": 0.5, "b1": 0.8, "b2": 0.95, "eps": 1e-6}
    got = trajectory(ol.natural_galore(fit=ol.svd(), **config), grads)
    # float32 SVDs against float64 ones
    assert_follows(got, reference.reference(grads, **config), 2e-3)


# The inverse


def test_is_the_dense_inverse_in_float64():
    """At every step: while the buffer fills, that of the gradients so far; then that of the last four."""
    grads = [normal(3, 5, seed=t, dtype=np.float64) for t in range(11)]
    with jax.enable_x64(True):
        got, _ = follow(ol.scale_by_woodbury_fisher(4, damping=0.01), grads)
        assert got[0].dtype == jnp.float64
        got = np.stack(got)
    want = [dense(grads[max(0, t - 3) : t + 1], 0.01) for t in range(len(grads))]
    for step in zip(got, want, strict=True):
        assert_follows(*step, 1e-10)


@pytest.mark.parametrize("norm", [1e-3, 1e-1, 1e1, 1e3])
def test_is_the_dense_inverse_in_float32(norm):
    """λ from 1e3 times the squared norm down to 1e-9 of it, by the singular values of H: no solve to go wrong."""
    grads = [normal(8, 16, seed=t) for t in range(7)]
    grads = [norm * g / np.linalg.norm(g) for g in grads]
    got, _ = follow(fisher(4, damping=1e-3), grads)
    for t in range(7):
        H = np.stack([g.ravel() for g in grads[max(0, t - 3) : t + 1]], axis=1)
        U, s, Vt = np.linalg.svd(H.astype(np.float64), full_matrices=False)
        want = (U * (s / (1e-3 + s**2))) @ Vt[:, -1]
        error = np.linalg.norm(got[t].ravel() - want) / np.linalg.norm(want)
        assert error < 1e-5


@pytest.mark.parametrize("damping", [0.0, 1e-30, 1e-3])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_repeated_gradients_stay_finite(damping, size):
    """HᵀH is singular, and λ may be nothing beside it. The step never exceeds that of g alone, ‖g‖ / ‖g‖²."""
    g = np.float32(size) * normal(4, 6)
    updates, _ = follow(fisher(3, damping=damping), [g] * 7)
    for update in updates:
        assert np.isfinite(update).all()
        # 3: single digits are lost where two of the columns cancel
        assert np.linalg.norm(update) <= 3 / np.linalg.norm(g)
        assert np.vdot(update, g) > 0


def test_repeated_gradients_share_the_step():
    """g / (λ + k ‖g‖²) after k ≤ s copies; condition 400, in float32."""
    g = normal(4, 6)
    g /= np.linalg.norm(g)
    updates, _ = follow(fisher(4, damping=0.01), [g] * 6)
    for k, update in zip([1, 2, 3, 4, 4, 4], updates, strict=True):
        assert_follows(update, g / (0.01 + k), 400 * 2e-7)


def test_zero_gradients():
    """Nothing stored, nothing done; and later no part of the Fisher."""
    grads = [np.zeros((4, 6), np.float32)] * 2 + [normal(4, 6, seed=t) for t in range(2)]
    for relative in (False, True):
        updates, _ = follow(fisher(3, damping=0.1, relative_damping=relative), grads)
        assert not np.any(updates[:2])
        alone, _ = follow(fisher(3, damping=0.1, relative_damping=relative), grads[2:])
        assert_trees_close(updates[2:], alone, ROUNDING)


def test_order_of_the_past_does_not_matter():
    """The same three gradients before the last, in any order and from any slot of the ring."""
    past, last = [normal(3, 5, seed=t) for t in range(3)], normal(3, 5, seed=9)
    ends = []
    for older in range(6):
        junk = [normal(3, 5, seed=20 + t) for t in range(older)]
        order = np.random.default_rng(older).permutation(3)
        updates, states = follow(fisher(4, damping=0.1), [*junk, *(past[i] for i in order), last])
        ends.append(updates[-1])
        assert int(states[-1].count) == older + 4
    for end in ends[1:]:
        assert_follows(end, ends[0], ROUNDING)


def test_one_column_of_history_rescales():
    """s = 1: g / (λ + ‖g‖²)."""
    grads = [normal(3, 5, seed=t) for t in range(3)]
    updates, _ = follow(fisher(1, damping=2.0), grads)
    for update, g in zip(updates, grads, strict=True):
        assert_follows(update, g / (2.0 + np.sum(g**2)), ROUNDING)


@pytest.mark.parametrize("relative", [True, False])
def test_relative_damping_has_no_scale(relative):
    """update(c g) = update(g) / c, exactly for a power of two; not so with λ in units of the gradient."""
    grads = [normal(3, 5, seed=t) for t in range(6)]
    tx = fisher(3, damping=0.1, relative_damping=relative)
    want, _ = follow(tx, grads)
    got, _ = follow(tx, [1024 * g for g in grads])
    same = [np.array_equal(1024 * a, b) for a, b in zip(got, want, strict=True)]
    assert same == [relative] * 6


def test_relative_damping_is_in_units_of_the_mean_square():
    """Of what is stored, not of the whole buffer while it fills."""
    grads = [normal(3, 5, seed=t) * (1 + t) for t in range(6)]
    updates, _ = follow(fisher(3, damping=0.1, relative_damping=True), grads)
    for t, update in enumerate(updates):
        past = grads[max(0, t - 2) : t + 1]
        assert_follows(update, dense(past, 0.1 * np.mean([np.sum(g**2) for g in past])), ROUNDING)


# Trees and batches

TREE = {"vector": (5,), "scalar": (), "nested": [(3, 4), (2, 3, 4)]}


def normal_tree(seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: random.standard_normal(shape).astype(np.float32),
        TREE,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_any_tree_without_projection():
    """Every leaf has a Fisher of its own, alone or beside others, under `jit` and in a chain."""
    grads = [normal_tree(seed) for seed in range(6)]
    tx = optax.chain(fisher(3, damping=0.5), optax.trace(0.9))
    updates, states = follow(tx, grads)
    assert jax.tree.structure(updates[0]) == jax.tree.structure(grads[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), states[-1]) == jax.tree.map(
        lambda x: (x.shape, x.dtype), states[0]
    )
    momentum = jax.tree.map(np.zeros_like, grads[0])
    for t, update in enumerate(updates):
        natural = jax.tree.map(lambda *past: dense(past, 0.5), *grads[max(0, t - 2) : t + 1])
        momentum = jax.tree.map(lambda m, x: (0.9 * m + x).astype(np.float32), momentum, natural)
        assert_trees_close(jax.tree.map(np.asarray, update), momentum, 3 * ROUNDING)


@pytest.mark.parametrize("history_dtype", [None, jnp.int8])
@pytest.mark.parametrize("batch_axes", [1, 2])
def test_batch_is_a_loop_over_its_entries(batch_axes, history_dtype):
    batch = (2, 3)[:batch_axes]
    size = np.exp(normal(*batch, 1, 1, seed=99))  # entries of very different size
    grads = [size * normal(*batch, 4, 5, seed=t) for t in range(5)]
    options = {"damping": 0.1, "relative_damping": True, "history_dtype": history_dtype}
    got, _ = follow(fisher(3, batch_axes=batch_axes, **options), grads)
    for index in np.ndindex(*batch):
        want, _ = follow(fisher(3, **options), [g[index] for g in grads])
        assert_trees_close([u[index] for u in got], want, ROUNDING)


def test_stacked_leaf_is_a_loop_over_its_layers():
    stacks = normal(5, 3, 8, 6)
    tx = ol.natural_galore(1.0, rank=2, update_proj_gap=2, damping=1.0, fit=ol.svd())
    layers = [trajectory(tx, stacks[:, i]) for i in range(3)]
    # two programs; refits, the solve and Adam amplify rounding
    assert_follows(trajectory(tx, stacks), np.stack(layers, axis=1), 1e-3)


PROGRAM = """
import jax, numpy as np, optax_lowrank as ol

random = np.random.default_rng(0)
shapes = [(4, 8 + i, 16) for i in range(16)]
grads = {str(i): random.standard_normal(shape).astype("float32") for i, shape in enumerate(shapes)}
tx = ol.scale_by_woodbury_fisher(history=16, batch_axes=1)
update, state = jax.jit(tx.update), tx.init(grads)
for _ in range(40):
    updates, state = update(grads, state)
jax.block_until_ready((updates, state))
print("done")
"""


def test_many_leaves_are_solved_without_a_deadlock():
    """Batched Cholesky factorizations that run at once have hung; in its own process, as that cannot be interrupted."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "done\n", done.stderr


# The stored history


def decoded(state):
    """(b, s, r, n) float32."""
    (history,) = jax.tree.leaves(state.history)
    scale = jax.tree.leaves(state.row_scale)
    return np.asarray(history, np.float32) * (np.asarray(scale[0]) if scale else 1)


DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_history(dtype):
    """Stored as asked, within half a unit; the step is the dense inverse of what is stored, Gram matrix included."""
    size = np.array([[1.0], [1e-3], [1e3], [0.0]], np.float32)  # each row of int8 has a scale
    grads = [size * normal(4, 6, seed=t) for t in range(7)]
    tx = fisher(3, damping=0.1, relative_damping=True, history_dtype=DTYPES[dtype])
    updates, states = follow(tx, grads)
    for t, after in enumerate(states[1:]):
        (state,) = after.leaves.values()
        assert state.history.dtype == (DTYPES[dtype] or jnp.float32)
        assert state.history.shape == (3, 4, 6)
        assert (state.row_scale is None) == (dtype != "int8")
        assert updates[t].dtype == jnp.float32
        H, slots = decoded(state), [i % 3 for i in range(max(0, t - 2), t + 1)]
        for slot, g in zip(slots, grads[max(0, t - 2) : t + 1], strict=True):
            largest = np.abs(g).max(axis=1, keepdims=True)
            unit = {"float32": 0, "bfloat16": 2**-7 * np.abs(g), "int8": largest / 127}[dtype]
            assert (np.abs(H[slot] - g) <= unit / 2 * (1 + 1e-4)).all()
        flat = H.reshape(3, -1)
        assert_follows(state.gram, flat @ flat.T, ROUNDING)
        lam = 0.1 * np.mean(np.sum(flat[slots] ** 2, axis=1))
        assert_follows(updates[t], dense([H[slot] for slot in slots], lam), ROUNDING)


@pytest.mark.parametrize("on_refresh", ["rotate", "clear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_history_after_refreshes(dtype, on_refresh):
    """The Gram matrix is that of the history, whichever basis is refit when; old columns are P_newᵀ P_old H or gone."""
    tx = ol.low_rank(
        fisher(3, history_dtype=DTYPES[dtype], on_refresh=on_refresh),
        rank=2,
        fit=ol.svd(),
        refresh=ol.on_staleness(0.4, min_gap=2, max_gap=4),  # layers at different times
    )
    grads = [normal(3, 6, 9, seed=t) for t in range(10)]
    _, states = follow(tx, [{"kernel": g} for g in grads])
    refits = 0
    for t, (old, state) in enumerate(itertools.pairwise(states)):
        leaf, leaf_old = state.leaves["kernel"], old.leaves["kernel"]
        H, H_old = decoded(leaf.rule), decoded(leaf_old.rule)
        assert leaf.rule.gram.shape == (3, 3, 3)
        flat = H.reshape(3, 3, -1)
        assert_follows(leaf.rule.gram, flat @ flat.swapaxes(1, 2), ROUNDING)

        P, P_old = np.asarray(leaf.basis), np.asarray(leaf_old.basis)
        Q = P.swapaxes(1, 2) @ P_old
        fitted = np.asarray(state.stats.last_fit == t)
        Q[~fitted] = np.eye(2)
        kept = np.arange(3) != t % 3
        want = np.einsum("brk,bskn->bsrn", Q, H_old)
        if on_refresh == "clear":
            want[fitted] = 0
        want[:, ~kept] = (P.swapaxes(1, 2) @ grads[t])[:, None]
        # rounded once more when they are rotated
        tolerance = {"float32": ROUNDING, "bfloat16": 2**-8, "int8": 1 / 127}[dtype]
        assert_follows(H, want, tolerance)
        if not fitted.any():
            assert_trees_equal(H[:, kept], H_old[:, kept])
        refits += 0 < fitted.sum() < 3
    assert refits


# Memory


def llama(layers, d, ff):
    """The layer matrices of the papers' LLaMAs, in stacks."""
    shapes = {**dict.fromkeys("qkvo", (d, d)), "gate": (d, ff), "up": (d, ff), "down": (ff, d)}
    stack = lambda shape: jax.ShapeDtypeStruct((layers, *shape), jnp.float32)
    return {"layers": {f"{name}_proj": {"kernel": stack(s)} for name, s in shapes.items()}}


# Arrays of the state as a share of AdamW's at rank d/4 and history 4: what the README tells.
SHARE = {"float32": 0.82, "bfloat16": 0.57, "int8": 0.45}


@pytest.mark.parametrize("size", [(8, 512, 1376), (24, 2048, 5461)], ids=["60M", "1B"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_smaller_than_that_of_adamw(size, dtype):
    """(m + 2n) r and history · r n numbers, m the short side; int8 has a float a row, the Gram matrix is nothing."""
    layers, d, ff = size
    r, s, item = d // 4, 4, jnp.dtype(DTYPES[dtype] or jnp.float32).itemsize
    tx = ol.natural_galore(1e-3, rank=r, history_dtype=DTYPES[dtype])
    report = ol.memory_report(tx, llama(*size))

    def matrix(m, n):
        rows = 4 * s * r if dtype == "int8" else 0
        return 4 * (m * r + 2 * r * n + s**2) + item * s * r * n + rows

    assert report.arrays == layers * (4 * matrix(d, d) + 3 * matrix(d, ff))
    assert round(report.arrays / report.adamw, 2) == SHARE[dtype]
    assert report.state < report.adamw  # with counters and statistics


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"history": 0},
            "`history` counts stored gradients with the current one: an int, at least 1, got 0",
        ),
        ({"damping": -1.0}, r"`damping` must not be negative, got -1\.0"),
    ],
)
@pytest.mark.parametrize(
    "make", [ol.scale_by_woodbury_fisher, functools.partial(ol.natural_galore, 0.1)]
)
def test_options_that_are_wrong(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_refresh_rule_that_is_none():
    with pytest.raises(ValueError, match='`on_refresh` must be "rotate" or "clear", got \'keep\''):
        ol.scale_by_woodbury_fisher(on_refresh="keep")


def test_preserve_norm_turns_the_gradient_and_nothing_else():
    random = np.random.default_rng(0)
    grads = [jnp.asarray(random.standard_normal((2, 4, 6)), jnp.float32) for _ in range(5)]
    options = {"history": 3, "damping": 0.5, "relative_damping": True, "batch_axes": 1}
    plain, kept = (
        ol.scale_by_woodbury_fisher(**options, preserve_norm=keep) for keep in (False, True)
    )
    grads.append(jnp.zeros((2, 4, 6)))
    norm = lambda z: np.linalg.norm(np.reshape(z, (2, -1)), axis=1)[:, None, None]
    for g, x, y in zip(grads, follow(plain, grads)[0], follow(kept, grads)[0], strict=True):
        np.testing.assert_allclose(norm(y), norm(g), rtol=1e-5)
        if norm(g).all():
            np.testing.assert_allclose(y / norm(y), x / norm(x), atol=1e-6)
    assert not norm(g).any()


def test_no_leaves():
    tx = ol.scale_by_woodbury_fisher()
    updates, state = tx.update({}, tx.init({}))
    assert updates == {}
    assert state.count == 1


def test_precondition_the_step():
    grads = [{"kernel": jnp.asarray(normal(6, 8, seed=seed))} for seed in range(5)]
    options = {"rank": 3, "fit": ol.svd()}
    fisher = ol.scale_by_woodbury_fisher(4, 0.5, preserve_norm=True)
    alias = functools.partial(ol.natural_galore, 1.0, damping=0.5, preserve_norm=True, **options)
    got, _ = follow(alias(precondition="step"), grads)
    # as a chain of rules, and as one of transformations
    for inner in (
        ol.chained(optax.scale_by_adam(), fisher),
        optax.chain(optax.scale_by_adam(), fisher),
    ):
        want, _ = follow(ol.low_rank(inner, scale=-0.25, **options), grads)
        assert_trees_close(got, want, ROUNDING)
    other, _ = follow(alias(), grads)
    assert not np.allclose(got[-1]["kernel"], other[-1]["kernel"], atol=1e-3)
    with pytest.raises(ValueError, match="`precondition` must be"):
        alias(precondition="moments")


@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_alone_a_bad_gradient_passes_and_is_forgotten(dtype):
    tx = ol.scale_by_woodbury_fisher(history=3, damping=1.0, history_dtype=dtype)
    good, bad = jnp.array([3.0, 4.0]), jnp.array([jnp.nan, 4.0])
    state = tx.init(good)
    for g in (good, bad, good):
        update, state = tx.update(g, state)
        assert bool(jnp.all(jnp.isfinite(update))) == bool(jnp.all(jnp.isfinite(g)))
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state))
    np.testing.assert_allclose(update, good / (1 + 2 * 25), rtol=1e-2)
