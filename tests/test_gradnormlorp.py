"""GradNormLoRP: the trajectories, the exact weight normalisation under it, and the bytes of the formula."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import (
    assert_trees_close,
    assert_trees_equal,
    compiled_step,
    low_rank_state,
    run,
    turning_gradients,
)
from .reference import gradnormlorp as reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
# float32 sums of up to 20 terms, and a few operations more
ROUNDING = 1e-5


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def column_norm(W):
    return np.linalg.norm(np.asarray(W, np.float64), axis=-2, keepdims=True)


def assert_follows(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@functools.cache  # compiled once for all tests of the same options
def small(**options):
    """The optimizer with bases of rank 2, refit at 0, 3, 6; exact ones compile fastest."""
    return ol.gradnormlorp(
        options.pop("learning_rate", 0.1), rank=2, update_proj_gap=3, fit=ol.svd(), **options
    )


# The trajectory


def trajectory(tx, params, grads):
    """Updates of one kernel, (steps, m, n), and the last state."""
    _, state, updates = run(tx, {"kernel": params}, [{"kernel": jnp.asarray(g)} for g in grads])
    return np.stack([u["kernel"] for u in updates]), state


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_golden_trace(shape):
    """Over two refreshes. 2e-3: five times what a literal transcription in float32 is off by."""
    trace = np.load(GOLDEN / f"gradnorm_{shape}.npz")
    tx = ol.gradnormlorp(fit=ol.svd(), **json.loads(str(trace["config"])))
    got, _ = trajectory(tx, jnp.asarray(trace["params"]), trace["grads"])
    assert_follows(got, trace["updates"], 2e-3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)], ids=str)
def test_reference_on_other_gradients(shape):
    """Slowly turning gradients, and any hyperparameters; gaps in the spectrum keep SVDs comparable."""
    grads = turning_gradients(shape).astype(np.float32)
    config = {"rank": 4, "update_proj_gap": 5, "scale": 0.7, "learning_rate": 0.03}
    config |= {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
    W = normal(*shape, seed=1)
    got, _ = trajectory(ol.gradnormlorp(fit=ol.svd(), **config), W, grads)
    # float32 SVDs against float64 ones
    assert_follows(got, reference.reference(grads, params=np.asarray(W), **config), 2e-3)


def test_one_side_by_hand():
    """First step, Adam without eps: V' = W − η α P sign(PᵀD_V), M' = M − η sign(D_M)."""
    W, D = np.asarray(normal(6, 9)), np.asarray(normal(6, 9, seed=1))
    M = column_norm(W)
    D_M = np.sum(D * W / M, axis=0, keepdims=True)
    D_V = D - W / M * D_M
    P = np.linalg.svd(D_V)[0][:, :2]
    V = W - 0.1 * 0.5 * P @ np.sign(P.T @ D_V)
    want = (M - 0.1 * np.sign(D_M)) * V / column_norm(V) - W
    got, state = trajectory(small(two_sided=False, scale=0.5, eps=0.0), jnp.asarray(W), [D])
    assert_follows(got[0], want, ROUNDING)
    assert {x.shape for x in moments(state)} == {(1, 2, 9), (1, 1, 9)}


def moments(state):
    return jax.tree.leaves([tree for _, tree in optax.tree.get_all_with_path(state, "mu")])


@pytest.mark.parametrize("narrow", ["nothing", "gradient", "basis"])
def test_round_off_in_the_core_takes_no_step(narrow):
    """After a refit on both sides R is diagonal; off it, momentum may only decay, or Adam's first steps are ±1."""
    bits = {"bits": 8, "min_size": 100} if narrow == "basis" else None  # bfloat16, and no codes
    tx = ol.gradnormlorp(0.1, rank=2, update_proj_gap=3, fit=ol.svd(), state_bits=bits)
    dtype = jnp.bfloat16 if narrow == "gradient" else jnp.float32
    W = {"kernel": normal(6, 9, dtype=dtype)}
    state, off = tx.init(W), ~np.eye(2, dtype=bool)
    previous = np.zeros((2, 2))
    for step in range(5):
        grad = {"kernel": normal(6, 9, seed=1 + step, dtype=dtype)}
        _, state, _ = compiled_step(tx)(W, state, grad)
        (core,) = (np.asarray(x[0]) for x in moments(state) if x.shape == (1, 2, 2))
        fed = np.abs(core - 0.9 * previous)
        assert (fed[~off] > 1e-3).all()
        if step % 3 == 0:
            assert (fed[off] <= 1e-7 * np.abs(previous[off])).all()  # rounding of 0.9 M
        else:
            assert (fed[off] > 1e-3).all()
        previous = core


# The weight normalisation


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 4)], ids=str)
def test_both_gradients_are_those_of_the_parametrisation(shape):
    """A step on (M, V) of W = M V / ‖V‖, from V = W, with gradients by autodiff; `inner` sees all of it."""
    seen = []

    def spy(updates, state, params):
        seen.append((updates, params))
        return updates, state

    W, target = normal(*shape), normal(*shape, seed=1)
    loss = lambda W: jnp.sum(jnp.sin(W * target) ** 2)
    tx = ol.weight_norm(
        optax.chain(optax.GradientTransformation(lambda p: optax.EmptyState(), spy), optax.sgd(0.1))
    )
    state = tx.init({"kernel": W})
    update, _ = tx.update({"kernel": jax.grad(loss)(W)}, state, {"kernel": W})

    M = jnp.linalg.norm(W, axis=-2, keepdims=True)
    weight = lambda M, V: M * V / jnp.linalg.norm(V, axis=-2, keepdims=True)
    D_M, D_V = jax.grad(lambda *parts: loss(weight(*parts)), argnums=(0, 1))(M, W)
    matrices = lambda x: x.reshape(-1, *x.shape[-2:])
    pair = lambda V, M: {"kernel": {"direction": matrices(V), "magnitude": matrices(M)}}
    ((given, params),) = seen
    assert_trees_close(given, pair(D_V, D_M), ROUNDING)
    assert_trees_close(params, pair(W, M), ROUNDING)
    assert_follows(W + update["kernel"], weight(M - 0.1 * D_M, W - 0.1 * D_V), ROUNDING)


def fixed(direction, magnitude):
    """An inner transformation of the kernel that gives these updates, whatever the gradient."""
    out = {"kernel": {"direction": direction[None], "magnitude": magnitude[None]}}
    return optax.GradientTransformation(lambda p: optax.EmptyState(), lambda u, s, p: (out, s))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_new_columns_have_the_new_magnitudes_and_directions(size):
    """W' = M' V' / ‖V'‖, for steps from far below float32's resolution of W to far beyond W."""
    W = normal(5, 7)
    u_V, u_M = size * normal(5, 7, seed=1), size * jnp.abs(normal(1, 7, seed=2))
    tx = ol.weight_norm(fixed(u_V, u_M))
    update, _ = tx.update({"kernel": W}, tx.init({"kernel": W}), {"kernel": W})
    W, u_V, u_M = (np.asarray(x, np.float64) for x in (W, u_V, u_M))
    M, V = column_norm(W) + u_M, W + u_V
    new = W + update["kernel"]
    np.testing.assert_allclose(column_norm(new), M, rtol=ROUNDING)
    assert_follows(new / column_norm(new), V / column_norm(V), ROUNDING)
    # relative to the update itself, not to W: nothing is lost by subtraction
    assert_follows(update["kernel"], M * V / column_norm(V) - W, 1e-4)


def test_magnitudes_never_turn_negative():
    """A step beyond zero leaves a column of no length; the others do not notice."""
    W, u_V = normal(5, 3), 0.1 * normal(5, 3, seed=1)
    tx = ol.weight_norm(fixed(u_V, jnp.array([[-100.0, -0.1, 100.0]])))
    update, _ = tx.update({"kernel": W}, tx.init({"kernel": W}), {"kernel": W})
    new, M, V = W + update["kernel"], column_norm(W), W + u_V
    assert np.linalg.norm(new[:, 0]) < 1e-6 * M[0, 0]
    np.testing.assert_allclose(column_norm(new)[0, 1:], M[0, 1:] + [-0.1, 100.0], rtol=ROUNDING)
    assert (np.sum(new * V, axis=0)[1:] > 0).all()


def test_columns_without_direction_move_freely():
    """A zero column gets the whole gradient as its direction's; one whose V' vanishes is no division by zero."""
    W = normal(5, 3).at[:, 0].set(0)
    D = normal(5, 3, seed=1)
    tx = ol.weight_norm(optax.sgd(0.1))
    update, _ = tx.update({"kernel": D}, tx.init({"kernel": W}), {"kernel": W})
    assert_follows(update["kernel"][:, 0], -0.1 * D[:, 0], ROUNDING)

    tx = ol.weight_norm(fixed(-W, jnp.zeros((1, 3))))
    update, _ = tx.update({"kernel": D}, tx.init({"kernel": W}), {"kernel": W})
    assert np.isfinite(update["kernel"]).all()


def test_scale_is_of_the_direction_only():
    """With scale 0 the columns keep their directions, and their norms are those of any other scale."""
    W, grads = normal(6, 9), [normal(6, 9, seed=1)]
    still, _ = trajectory(small(scale=0.0), W, grads)
    turned, _ = trajectory(small(scale=1.0), W, grads)
    unit = lambda update: (W + update[0]) / column_norm(W + update[0])
    assert_follows(unit(still), W / column_norm(W), ROUNDING)
    assert np.abs(unit(turned) - unit(still)).max() > 0.01
    np.testing.assert_allclose(column_norm(W + turned[0]), column_norm(W + still[0]), rtol=ROUNDING)
    assert np.abs(column_norm(W + still[0]) - column_norm(W)).min() > 0.05


# Hard cases through the whole optimizer

PARAMS = {"kernel": (6, 9), "layers": {"kernel": (3, 6, 9)}, "bias": (9,)}


def tree(seed, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), dtype),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize("two_sided", [True, False])
def test_zero_gradients_give_updates_of_exactly_zero(two_sided):
    """From the start, for 4 steps with a refit that is due; nor does the weight's norm drift by rounding."""
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    _, _, updates = run(small(two_sided=two_sided), tree(0), [zeros] * 4)
    assert_trees_equal(updates, [zeros] * 4)


@pytest.mark.parametrize("what", ["all", "columns", "rows", "tiny", "gradients"])
def test_zeros_never_give_nan(what):
    """Zero kernels and biases, zero columns and rows, numbers whose squares underflow, columns without gradient."""
    params, grads = tree(0), [tree(1 + step) for step in range(5)]
    if what == "gradients":
        grads = [jax.tree.map(lambda x: x.at[..., :4].set(0), grad) for grad in grads]
    else:
        spoil = {
            "all": jnp.zeros_like,
            "columns": lambda x: x.at[..., :4].set(0),
            "rows": lambda x: x.at[..., :4, :].set(0) if x.ndim > 1 else x,
            "tiny": lambda x: 1e-30 * x,
        }[what]
        params = jax.tree.map(spoil, params)
    end, state, updates = run(small(), params, grads)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((end, state, updates)))
    assert all(bool(x.any()) for x in jax.tree.leaves(updates[0]))


def of_layer(state, path, layer):
    """What the state holds for one matrix."""
    return jax.tree.map(lambda x: x[layer], low_rank_state(state).leaves[path])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_matrix_that_is_not_finite_is_skipped(step, bad):
    """One entry in layer 1 of the stack, at a refit or not: it stands still, the others go on as ever."""
    good = [tree(1 + t) for t in range(5)]
    grads = list(good)
    layers = good[step]["layers"]["kernel"].at[1, 2, 3].set(bad)
    grads[step] = {**good[step], "layers": {"kernel": layers}}
    tx, one_step = small(), compiled_step(small())
    params = want_params = tree(0)
    state = want_state = tx.init(params)
    for t in range(5):
        old = state
        params, state, updates = one_step(params, state, grads[t])
        want_params, want_state, _ = one_step(want_params, want_state, good[t])
        if t == step:
            assert not updates["layers"]["kernel"][1].any()
            same = [of_layer(s, "layers/kernel", 1) for s in (old, state)]
            assert_trees_equal(*same)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state)))
    others = jnp.array([0, 2])
    for path, layer in (("layers/kernel", others), ("kernel", 0)):
        assert_trees_equal(of_layer(state, path, layer), of_layer(want_state, path, layer))
    assert_trees_equal(params["bias"], want_params["bias"])
    # afterwards layer 1 moves again
    assert np.abs(updates["layers"]["kernel"][1]).max() > 0.01


def test_bfloat16_parameters():
    """The update is that of the same numbers in float32, to the precision of its products; the state is float32."""
    params, tx = {"kernel": normal(6, 9, dtype=jnp.bfloat16)}, small()
    wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    state = wide_state = tx.init(params)
    for step in range(4):
        grad = {"kernel": normal(6, 9, seed=1 + step, dtype=jnp.bfloat16)}
        _, wide_state, want = compiled_step(tx)(wide(params), wide_state, wide(grad))
        params, state, updates = compiled_step(tx)(params, state, grad)
        assert updates["kernel"].dtype == params["kernel"].dtype == jnp.bfloat16
        assert_trees_close(wide(updates), want, 2e-2)
    assert_trees_close(state, wide_state, 4e-2)  # with second moments
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    assert {d for d in dtypes if jnp.issubdtype(d, jnp.floating)} == {jnp.dtype(jnp.float32)}


# Leaves that are no plain kernels


def test_stacked_leaf_is_a_loop_over_its_layers():
    W, grads = normal(3, 8, 6), [normal(3, 8, 6, seed=1 + t) for t in range(5)]
    got, _ = trajectory(small(), W, grads)
    layers = [trajectory(small(), W[i], [grad[i] for grad in grads])[0] for i in range(3)]
    # two programs; refits amplify rounding, and Adam divides by small coordinates
    assert_follows(got, np.stack(layers, axis=1), 1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "matrix"), [("query", (8, 2, 3), (8, 6)), ("out", (2, 4, 6), (8, 6))]
)
def test_attention_kernels_are_the_matrices_they_make(name, shape, matrix):
    """A magnitude for each output of each head; the heads of `out` are inputs."""
    W, grads = normal(*shape), [normal(*shape, seed=1 + t) for t in range(4)]
    params = {"attention": {name: {"kernel": W}}}
    trees = [{"attention": {name: {"kernel": grad}}} for grad in grads]
    _, state, updates = run(small(), params, trees)
    got = np.stack([u["attention"][name]["kernel"].reshape(matrix) for u in updates])
    want, _ = trajectory(small(), W.reshape(matrix), [grad.reshape(matrix) for grad in grads])
    assert_follows(got, want, 1e-3)
    assert (1, 1, 6) in {x.shape for x in moments(state)}


# Weight decay and learning rate


MASKS = {
    "none": (None, [True, True, True]),  # and whether bias, kernel and layers decay
    "tree": ({"kernel": True, "layers": {"kernel": False}, "bias": False}, [False, True, False]),
    "callable": (lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree), [False, True, False]),
    "prefix": ({"kernel": False, "layers": True, "bias": True}, [True, False, True]),
}


@pytest.mark.parametrize("form", MASKS)
def test_weight_decay_shortens_columns_where_the_mask_says(form):
    """By η λ M, without a turn; biases decay as in AdamW."""
    mask, chosen = MASKS[form]
    params, grad = tree(0), tree(1)
    _, _, (plain,) = run(small(), params, [grad])
    tx = ol.gradnormlorp(0.1, rank=2, update_proj_gap=3, fit=ol.svd(), weight_decay=0.5, mask=mask)
    _, _, (decayed,) = run(tx, params, [grad])
    for W, u, v, decays in zip(
        *map(jax.tree.leaves, (params, plain, decayed)), chosen, strict=True
    ):
        if W.ndim == 1:
            np.testing.assert_allclose(v, u - 0.1 * 0.5 * decays * W, rtol=0, atol=1e-6)
            continue
        norms = [column_norm(W + x) for x in (u, v)]
        np.testing.assert_allclose(
            norms[1], norms[0] - 0.1 * 0.5 * decays * column_norm(W), rtol=ROUNDING
        )
        assert_follows((W + v) / norms[1], (W + u) / norms[0], ROUNDING)


def test_schedule_reaches_both_parts():
    """At step t the update is that of the constant η_t: the state does not depend on η, the update is not linear."""
    rates = [0.0, 0.3, 0.01]
    params, *grads = ({"kernel": normal(6, 9, seed=t), "bias": normal(9, seed=t)} for t in range(4))

    def at(learning_rate):
        tx = small(learning_rate=learning_rate)
        state, update, history = tx.init(params), jax.jit(tx.update), []
        for grad in grads:
            updates, state = update(grad, state, params)
            history.append(updates)
        return history

    got = at(lambda count: jnp.array(rates)[count])
    for t, rate in enumerate(rates):
        assert_trees_close(got[t], at(rate)[t], ROUNDING)
    assert not any(bool(x.any()) for x in jax.tree.leaves(got[0]))


# Memory and errors


@pytest.mark.parametrize("shape", [(512, 1376), (1376, 512), (512, 512)], ids=str)
@pytest.mark.parametrize("two_sided", [True, False])
def test_bytes(shape, two_sided):
    """(m + n) r + 2 r² + 2 out floats a matrix, no copy of it; on one side m r + 2 r n + 2 out, m the short one."""
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((24, *shape), jnp.float32)}}
    report = ol.memory_report(ol.gradnormlorp(1e-3, rank=128, two_sided=two_sided), params)
    r, (m, n), out = 128, sorted(shape), shape[1]
    core = (m + n) * r + 2 * r**2 if two_sided else m * r + 2 * r * n
    assert report.arrays == 4 * 24 * (core + 2 * out)


@pytest.mark.parametrize("make", [small, lambda: ol.weight_norm(optax.sgd(0.1))])
def test_update_needs_the_weights(make):
    params, tx = {"kernel": normal(6, 9)}, make()
    with pytest.raises(ValueError, match=r"needs the weights: call `tx\.update"):
        tx.update(params, tx.init(params))


def test_weight_norm_of_a_bias():
    with pytest.raises(ValueError, match=r"no matrix view for \['bias'\]\. Use `optax.masked` or"):
        ol.weight_norm(optax.sgd(0.1)).init({"kernel": normal(6, 9), "bias": normal(9)})
