"""Equations that hold for every gradient: what projection, views and precision may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import assert_trees_close, assert_trees_equal

# float32 sums of up to 20 terms, twice; Adam's division adds to it
ROUNDING = 1e-5
FITS = {
    "svd": ol.svd(),
    "randomized_svd": ol.randomized_svd(),
    "subspace_iteration": ol.subspace_iteration(),
    "gaussian": ol.gaussian(),
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


@pytest.mark.parametrize("fit", FITS)
def test_identity_in_both_slots_is_the_identity(fit):
    """P PᵀG + (G − P PᵀG) = G, whatever P is."""
    grads = gradients((6, 9))
    tx = ol.low_rank(
        optax.identity(), rank=2, fit=FITS[fit], residual=optax.identity(), refresh=ol.every(2)
    )
    assert_trees_close(updates_of(tx, grads), grads, ROUNDING)


def test_without_residual_the_update_is_in_the_subspace():
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


def test_jit_changes_nothing():
    grads, tx = gradients((2, 6, 9)), adam(refresh=ol.every(2))
    with jax.disable_jit():
        want = updates_of(tx, grads, tx.update)
    assert_trees_close(updates_of(tx, grads), want, 1e-4)


def test_leaves_do_not_see_each_other():
    """One leaf alone, beside a twin of its shape, and beside another: the same updates."""
    tx, grads, twins = adam(), gradients((6, 9)), gradients((6, 9), seed=1)
    others = gradients((5, 7), seed=2)

    def beside(name, more):
        update = jax.jit(tx.update)
        state, history = tx.init({"kernel": grads[0], name: more[0]}), []
        for grad, other in zip(grads, more, strict=True):
            updates, state = update({"kernel": grad, name: other}, state)
            history.append(updates["kernel"])
        return history

    want = updates_of(tx, grads)
    # not bit for bit, because XLA may fuse another way
    assert_trees_close(beside("a_twin", twins), want, 1e-4)
    assert_trees_close(beside("z_other", others), want, 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    """Updates in the gradient's dtype; bases and moments in float32, as for float32 gradients."""
    tx = adam(residual=optax.trace(0.9))
    grad = {"kernel": gradients((6, 9))[0].astype(dtype)}
    state = tx.init(grad)
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    assert dtypes == jax.tree.map(lambda x: x.dtype, tx.init({"kernel": jnp.zeros((6, 9))}))
    updates, state = tx.update(grad, state)
    assert updates["kernel"].dtype == dtype
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes


def test_float64_stays_float64():
    with jax.enable_x64(True):
        tx, grad = adam(), {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((6, 9)))}
        updates, state = tx.update(grad, tx.init(grad))
        assert updates["kernel"].dtype == state.basis["kernel"].dtype == jnp.float64
        assert state.inner.mu["kernel/R"].dtype == jnp.float64
        P = np.asarray(state.basis["kernel"][0])
        np.testing.assert_allclose(P.T @ P, np.eye(3), rtol=0, atol=1e-14)
        full = ol.low_rank(optax.identity(), rank=6)
        same, _ = full.update(grad, full.init(grad))
        np.testing.assert_allclose(same["kernel"], grad["kernel"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fit", ["randomized_svd", "subspace_iteration"])
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
