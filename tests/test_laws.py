"""Equations that hold for every gradient: what projection, views and precision may not change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr

import optax_lowrank as ol

from .helpers import OPTIMIZERS, assert_trees_close, assert_trees_equal

# float32 sums of up to 20 terms, twice; Adam's division adds to it
ROUNDING = 1e-5
FITS = {
    "svd": ol.svd(),
    "randomized_svd": ol.randomized_svd(),
    "subspace_iteration": ol.subspace_iteration(),
    "gaussian": ol.gaussian(),
    "seeded": ol.seeded(),
    "dct": ol.dct(),
}
adam = functools.partial(ol.low_rank, optax.scale_by_adam(), rank=3, fit=ol.svd())


def gradients(shape, steps=3, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for _ in range(steps)]


def updates_of(tx, grads, update=None):
    """Updates of one leaf, called `kernel`, along these gradients."""
    state, update = tx.init({"kernel": grads[0]}), update or jax.jit(tx.update)
    history = []
    for grad in grads:
        updates, state = update({"kernel": grad}, state)
        history.append(updates["kernel"])
    return history


@pytest.mark.parametrize(
    ("shape", "fit"),
    [*(((6, 9), fit) for fit in FITS), ((9, 6), "svd"), ((7, 7), "svd"), ((2, 5, 6), "svd")],
    ids=str,
)
def test_full_rank_is_the_inner_transformation(fit, shape):
    """P is square and orthogonal, so P PᵀG = G."""
    grads = gradients(shape)
    tx = ol.low_rank(optax.identity(), rank=100, fit=FITS[fit], refresh=ol.every(2))
    assert_trees_close(updates_of(tx, grads), grads, ROUNDING)


def weighing(step):
    """A rule without a state, (A, c) = step(R)."""
    rule = lambda R, columns, state: (*step(R), state)
    return ol.Rule(lambda R: (), lambda state, turn: state, rule)


def ones(R):
    return jnp.ones(R.shape[1], R.dtype)


@pytest.mark.parametrize("A", [None, 0.0])
@pytest.mark.parametrize(("rank", "fit"), [(1, "randomized_svd"), (4, "seeded"), (6, "svd")])
def test_no_step_and_unit_weights_are_the_identity(rank, fit, A):
    """U = G diag(1), whatever P is."""
    grads = gradients((6, 9))
    rule = weighing(lambda R: (A if A is None else A * R, ones(R)))
    tx = ol.low_rank(rule, rank=rank, fit=FITS[fit], refresh=ol.every(2))
    assert_trees_equal(updates_of(tx, grads), grads)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_what_is_taken_from_coordinates_is_taken_from_the_gradient(shape):
    """A = −R diag(c) with c = 1, 2, …: (G − P PᵀG) diag(c)."""
    grads, c = gradients(shape), np.arange(1.0, 10.0, dtype=np.float32)
    tx = ol.low_rank(weighing(lambda R: (-R * c[None], jnp.asarray(c))), rank=2, fit=ol.svd())
    upright = lambda x: np.asarray(x if shape == (6, 9) else x.T)
    P = np.linalg.svd(upright(grads[0]))[0][:, :2]
    for grad, update in zip(grads, updates_of(tx, grads), strict=True):
        G = upright(grad)
        np.testing.assert_allclose(upright(update), (G - P @ (P.T @ G)) * c, rtol=0, atol=1e-4)


def test_without_weights_the_update_is_in_the_subspace():
    tx = adam(refresh=ol.every(2))
    for updates in updates_of(tx, gradients((8, 12))):
        values = np.linalg.svd(updates, compute_uv=False)
        assert values[3] < ROUNDING * values[0] < values[2]


@pytest.mark.parametrize(
    ("side", "fit"), [("short", "svd"), ("long", "svd"), ("short", "randomized_svd")]
)
def test_transposed_leaf_has_the_transposed_update(side, fit):
    """The side is chosen by length, so a kernel that is not square may be stored either way."""
    grads = gradients((6, 9), steps=4)
    tx = adam(fit=FITS[fit], side=side, refresh=ol.every(2))
    want = updates_of(tx, grads)
    got = updates_of(tx, [grad.T for grad in grads])
    # 1e-3: XLA may multiply the transposed matrices in another order, and the refit amplifies that
    assert_trees_close([updates.T for updates in got], want, 1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_leaf_is_a_loop_over_its_layers(axis):
    stacks = gradients((4, 8, 6), steps=4)
    tx = adam(refresh=ol.every(2))
    update = jax.jit(tx.update)  # layers share one compiled program
    want = [updates_of(tx, [stack[i] for stack in stacks], update) for i in range(4)]
    got = updates_of(tx, [jnp.moveaxis(stack, 0, axis) for stack in stacks])
    want = [jnp.stack(layers, axis) for layers in zip(*want, strict=True)]
    assert_trees_close(got, want, 1e-4)


def test_heads_and_folded_axes_are_the_matrix_they_make():
    """An attention kernel (d, heads, head_dim) is one matrix of d × heads · head_dim."""
    grads = gradients((12, 2, 4), steps=4)
    tx = adam(refresh=ol.every(2), axes={"kernel": ol.MatrixAxes(0, (1, 2))})
    got = [updates.reshape(12, 8) for updates in updates_of(tx, grads)]
    want = updates_of(adam(refresh=ol.every(2)), [grad.reshape(12, 8) for grad in grads])
    assert_trees_close(got, want, 1e-4)


@pytest.mark.parametrize("fit", ["svd", "randomized_svd"])
def test_rotating_the_projected_side_rotates_the_update(fit):
    """Within one basis: update(O G) = O update(G), with coordinates unchanged up to sign, to which Adam is odd."""
    grads = gradients((6, 9), steps=4)
    O = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0].astype(np.float32)
    tx = adam(fit=FITS[fit], refresh=ol.every(100))
    want = [O @ updates for updates in updates_of(tx, grads)]
    # 1e-3: float32 round-off of the coordinates, where Adam divides by small ones
    assert_trees_close(updates_of(tx, [O @ grad for grad in grads]), want, 1e-3)


def test_scaling_the_gradient_does_not_change_adam():
    grads = gradients((6, 9), steps=4)
    tx = ol.low_rank(optax.scale_by_adam(eps=0), rank=3, fit=ol.svd(), refresh=ol.every(2))
    want = updates_of(tx, grads)
    # a power of two, so that nothing rounds differently
    assert_trees_equal(updates_of(tx, [1024 * grad for grad in grads]), want)


def test_leaves_do_not_see_each_other():
    """One leaf alone, and beside others, of its shape and of another, of any name: the same updates."""
    names, rule = ["mu", "nu", "R", "value", "basis"], ol.rotated(optax.scale_by_adam())
    tx = ol.low_rank(rule, rank=3, fit=ol.svd(), refresh=ol.every(2))
    seen = {name: gradients((6, 9) if i else (5, 7), seed=i) for i, name in enumerate(names)}
    update, alone = jax.jit(tx.update), jax.jit(tx.update)
    state = tx.init({name: grads[0] for name, grads in seen.items()})
    together = []
    for step in range(3):
        out, state = update({name: grads[step] for name, grads in seen.items()}, state)
        together.append(out)
    for name, grads in seen.items():
        want = updates_of(tx, grads, alone)
        # not bit for bit, because XLA may fuse another way
        assert_trees_close([out[name] for out in together], want, 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    """Updates in the gradient's dtype; bases and moments in float32, as for float32 gradients."""
    for tx in (ol.low_rank(weighing(lambda R: (R, ones(R))), rank=3), adam()):
        grad = {"kernel": gradients((6, 9))[0].astype(dtype)}
        state = tx.init(grad)
        dtypes = jax.tree.map(lambda x: x.dtype, state)
        assert dtypes == jax.tree.map(lambda x: x.dtype, tx.init({"kernel": jnp.zeros((6, 9))}))
        updates, state = jax.eval_shape(tx.update, grad, state)
        assert updates["kernel"].dtype == dtype
        assert jax.tree.map(lambda x: x.dtype, state) == dtypes


def test_float64_stays_float64():
    with jax.enable_x64(True):
        tx, grad = adam(), {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((6, 9)))}
        updates, state = tx.update(grad, tx.init(grad))
        leaf = state.leaves["kernel"]
        dtypes = {x.dtype for x in (updates["kernel"], leaf.basis, leaf.rule.mu)}
        assert dtypes == {jnp.dtype(jnp.float64)}
        P = np.asarray(leaf.basis[0])
        np.testing.assert_allclose(P.T @ P, np.eye(3), rtol=0, atol=1e-14)
        full = ol.low_rank(optax.identity(), rank=6)
        same, _ = full.update(grad, full.init(grad))
        np.testing.assert_allclose(same["kernel"], grad["kernel"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fit", ["randomized_svd", "subspace_iteration", "seeded", "dct"])
def test_a_state_copied_through_numpy_continues_bit_for_bit(fit):
    """Nothing but arrays is remembered: no key, no Python counter. Refits at 2 and 4 come after the copy."""
    tx = adam(fit=FITS[fit], refresh=ol.every(2))
    grads, update = [{"kernel": grad} for grad in gradients((2, 6, 9), steps=6)], jax.jit(tx.update)
    state = tx.init(grads[0])
    for grad in grads[:2]:
        _, state = update(grad, state)
    leaves, treedef = jax.tree.flatten(state)
    copy = treedef.unflatten(jnp.asarray(np.array(leaf)) for leaf in leaves)
    fresh = jax.jit(
        ol.low_rank(optax.scale_by_adam(), rank=3, fit=FITS[fit], refresh=ol.every(2)).update
    )
    for grad in grads[2:]:
        want, state = update(grad, state)
        got, copy = fresh(grad, copy)
        assert_trees_equal(got, want)
    assert_trees_equal(copy, state)


# What is compiled


def compiled_step(tx, params):
    """Update and apply, parameters and state donated."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def temporaries(tx, shape, leaves):
    """Bytes that a donated step needs besides its arguments."""
    params = {f"{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(leaves)}
    return compiled_step(tx, params).memory_analysis().temp_size_in_bytes


# Bases of OPTIMIZERS have two columns, nothing beside a leaf; what is large in a state shows at a larger rank.
LARGE_STATES = {
    "accumulate": functools.partial(ol.galore, rank=64, accumulate=2),
    "accumulate_8bit": functools.partial(ol.galore, rank=64, accumulate=2, state_bits=8),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *LARGE_STATES])
def test_temporaries_do_not_grow_with_the_number_of_leaves(name):
    """One leaf after the other."""
    tx = (OPTIMIZERS | LARGE_STATES)[name](0.1)
    # the side that is projected is the second in memory, which takes transposed copies
    shape = (256, 512) if name in ("galore_long_side", "gradnormlorp") else (512, 256)
    assert temporaries(tx, shape, 4) - temporaries(tx, shape, 1) < 4 * 512 * 256


# What XLA fuses into one pass, so that its operands and results need not be arrays in memory.
FUSED = """
abs add and argmax broadcast_in_dim convert_element_type copy div eq exp expand_dims ge gt integer_pow is_finite le
log lt max min mul ne neg not optimization_barrier or pow reduce_and reduce_max reduce_min reduce_or reduce_sum reshape
rsqrt select_n sign sqrt square squeeze sub
"""


def unfused(jaxpr, size):
    """Primitives of an ordinary step that read or write floats of this size, wider than bfloat16, in memory."""
    wide = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 2
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, []
        if name not in ("cond", "while", "scan"):  # a refit, or moments turned after it
            inner = [x.jaxpr for x in eqn.params.values() if isinstance(x, ClosedJaxpr)]
        for sub in inner:
            yield from unfused(sub, size)
        large = [x for v in (*eqn.invars, *eqn.outvars) if (x := v.aval).size >= size and wide(x)]
        if large and not inner and name not in FUSED.split():
            yield name


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_float32_copy_of_a_bfloat16_gradient(name, shape):
    """Outside refits, float32 of a leaf's size is only ever within a pass that reads and writes bfloat16."""
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    tx = OPTIMIZERS[name](0.1)
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params).jaxpr
    assert list(unfused(jaxpr, 96 * 160)) == []
    assert all(x.aval.size < 96 * 160 or x.aval.dtype == jnp.bfloat16 for x in jaxpr.outvars)


@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_no_stack_is_transposed(name, side):
    """A leaf that holds its projected side last is stepped where it lies: to move one took a twentieth of a step."""
    stack = (3, 160, 96) if side == "short" else (3, 96, 160)
    params = {"kernel": jax.ShapeDtypeStruct(stack, jnp.float32)}
    compiled = compiled_step(OPTIMIZERS[name](0.1, side=side), params)
    moved = re.compile(r"f32\[3,(96,160|160,96)\]\S* (copy|transpose)\(")
    assert not moved.search(compiled.as_text())
