"""Low-rank Muon: Optax's Muon wherever the momentum fits into the basis; its bytes, and `orthogonalize` alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol
from optax_lowrank.methods.low_rank_muon import low_rank_momentum, orthogonalized

# What Newton–Schulz makes of small singular values, five times 3.4 times as much, it makes of rounding as well.
X64 = functools.partial(jax.enable_x64, True)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def trajectory(tx, grads):
    """Updates of one kernel along (steps, ..., m, n) gradients, and the last state."""
    params = {"kernel": jnp.asarray(grads[0])}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for grad in grads:
        updates, state = update({"kernel": jnp.asarray(grad)}, state, params)
        out.append(updates["kernel"])
    return np.stack(out), state


def assert_follows(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


SHAPES = [(6, 10), (10, 6), (7, 7)]

# The basis follows the momentum.
TRACKED = functools.partial(
    ol.low_rank_muon, fit=ol.subspace_iteration(), update_proj_gap=1, side="short"
)


@pytest.mark.parametrize(
    ("shape", "nesterov"), [(shape, i != 1) for i, shape in enumerate(SHAPES)], ids=str
)
def test_at_full_rank_it_is_muon(shape, nesterov):
    grads = normal(6, *shape)
    rule = low_rank_momentum(0.9, nesterov)
    tx = ol.low_rank(
        rule,
        rank=min(shape),
        fit=ol.subspace_iteration(),
        refresh=ol.every(1),
        geometry=orthogonalized(),
    )
    with X64():
        want, _ = trajectory(optax.contrib.muon(1.0, beta=0.9, nesterov=nesterov), grads)
        got, _ = trajectory(tx, grads)
    assert_follows(-got, want, 1e-4)


def in_a_plane(m, n):
    """Gradients of rank 1 whose columns lie in one plane, so that a momentum of rank 2 is made of them."""
    return normal(m, 2) @ normal(6, 2, 1, seed=1) @ normal(6, 1, n, seed=2)


@pytest.mark.parametrize(
    ("side", "shape", "nesterov"),
    [("short", (6, 10), True), ("long", (10, 6), False), ("short", (7, 7), True)],
)
def test_a_momentum_that_fits_into_the_basis_is_kept(side, shape, nesterov):
    grads = in_a_plane(*shape)
    options = {"beta": 0.9, "nesterov": nesterov, "consistent_rms": 0.2}
    with X64():
        want, _ = trajectory(optax.contrib.muon(0.1, **options), grads)
        got, _ = trajectory(TRACKED(0.1, rank=3, side=side, **options), grads)
    assert_follows(got, want, 1e-4)


def test_a_fit_to_the_gradient_alone_would_lose_it():
    make = functools.partial(ol.low_rank, rank=3, fit=ol.svd(), refresh=ol.every(1))
    rule = low_rank_momentum()
    with X64():
        kept, _ = trajectory(make(rule), in_a_plane(6, 10))
        lost, _ = trajectory(make(rule._replace(recall=None)), in_a_plane(6, 10))
    assert np.abs(kept[-1] - lost[-1]).max() > 0.1 * np.abs(kept[-1]).max()


def test_stacked_leaf_is_a_loop_over_its_layers():
    stacks = normal(5, 3, 8, 6)
    with X64():
        tx = ol.low_rank_muon(0.1, rank=2, fit=ol.svd())
        layers = [trajectory(tx, stacks[:, i])[0] for i in range(3)]
        got, _ = trajectory(tx, stacks)
    assert_follows(got, np.stack(layers, axis=1), 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_momentum_in_codes(bits):
    grads = (normal(8, 16) + 0.3 * normal(6, 8, 16, seed=1)).astype(np.float32)
    make = functools.partial(TRACKED, 0.1, rank=4)
    want, _ = trajectory(make(), grads)
    got, _ = trajectory(make(state_bits={"bits": bits, "min_size": 16}), grads)
    assert np.isfinite(got).all()
    off = np.linalg.norm(got - want, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))
    assert 0 < off.max() < {8: 0.1, 4: 0.5}[bits]


def test_bytes():
    """r floats a row of the short side, or m r + n r with a basis; in 8 bits a scale for 256, the basis 16 bits."""
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((24, 512, 1024), jnp.float32)}}
    report = functools.partial(ol.memory_report, params=params)
    r, m, n = 64, 512, 1024
    assert report(ol.low_rank_muon(0.02, rank=r)).arrays == 4 * 24 * r * m
    assert report(ol.low_rank_muon(0.02, rank=r, state_bits=8)).arrays == 24 * r * (
        m + 4 * m // 256
    )
    assert report(TRACKED(0.02, rank=r)).arrays == 4 * 24 * (m + n) * r
    coded = report(TRACKED(0.02, rank=r, state_bits=8)).arrays
    assert coded == 24 * r * (2 * m + n + 4 * n // 256)


def test_by_default_the_basis_is_random_on_the_longer_side_and_new_every_20_steps():
    grads = normal(25, 10, 6)
    options = {"rank": 2, "beta": 0.9}
    core = ol.low_rank(
        low_rank_momentum(0.9),
        rank=2,
        fit=ol.seeded(),
        refresh=ol.every(20),
        side="long",
        geometry=orthogonalized(),
    )
    with X64():
        got, state = trajectory(ol.low_rank_muon(1.0, **options), grads)
        want, _ = trajectory(core, grads)
        other, _ = trajectory(ol.low_rank_muon(1.0, update_proj_gap=99, **options), grads)
    assert_follows(-got, want, 1e-6)
    np.testing.assert_array_equal(got[:20], other[:20])
    assert np.abs(got[20] - other[20]).max() > 0.01
    assert ol.diagnostics(state)["kernel"].steps_since_refresh.tolist() == [4]


def test_bad_gradients():
    """NaN is no step and leaves the momentum; zero goes on with it, in the basis as it is."""
    good = normal(3, 6, 10).astype(np.float32)
    tx = ol.low_rank_muon(0.1, rank=2, fit=ol.svd())
    got, _ = trajectory(tx, np.stack([good[0], good[0] * np.nan, 0 * good[0], good[1]]))
    norms = np.linalg.norm(got, axis=(1, 2))
    assert np.isfinite(norms).all()
    assert norms[1] == 0
    assert (norms[[0, 2, 3]] > 0.1).all()


@pytest.mark.parametrize("size", [0.0, 3e3])
def test_float16(size):
    """It has no numbers for 1e-8, nor for the norm of large gradients."""
    G = jnp.asarray(size * normal(1, 16, 24)[0], jnp.float16)
    update, _ = ol.orthogonalize().update({"w": G}, optax.EmptyState())
    want, _ = ol.orthogonalize().update({"w": G.astype(jnp.float32)}, optax.EmptyState())
    assert update["w"].dtype == jnp.float16
    np.testing.assert_allclose(update["w"], want["w"], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"side": "both"}, '`side` must be "short" or "long" in `low_rank_muon`'),
        ({"accumulate": 2}, "`accumulate` must be 1 in `low_rank_muon`, got 2"),
    ],
)
def test_options_that_are_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        ol.low_rank_muon(0.1, **options)


# Orthogonalize


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_keeps_singular_vectors(shape, consistent_rms):
    """And makes their values alike, about 1 times the scale of the shape."""
    X = normal(*shape)
    with X64():
        tx = ol.orthogonalize(consistent_rms=consistent_rms)
        Y = np.asarray(tx.update({"kernel": jnp.asarray(X)}, tx.init({}))[0]["kernel"])
    U, sigma, Vt = np.linalg.svd(X, full_matrices=False)
    fan_in, fan_out = shape
    size = max(1, fan_out / fan_in) ** 0.5
    if consistent_rms:
        size = consistent_rms * max(shape) ** 0.5
    core = U.T @ Y @ Vt.T / size
    assert sigma[0] > 2 * sigma[-1] > 0.04 * np.linalg.norm(sigma)
    assert ((np.diag(core) > 0.65) & (np.diag(core) < 1.25)).all()
    np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=1e-6)


def test_orthogonalize_of_trees():
    """Stacks are taken apart, heads are one matrix, biases pass, zeros stay zeros, dtypes too."""
    tree = {
        "layers": {"mlp": {"kernel": normal(3, 6, 8)}},
        "attention": {"query": {"kernel": normal(6, 2, 4)}},
        "bias": normal(8),
        "nothing": {"kernel": np.zeros((6, 8))},
    }
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    tree["half"] = {"kernel": jnp.asarray(normal(6, 8), jnp.bfloat16)}
    tx = ol.orthogonalize()
    got, _ = jax.jit(tx.update)(tree, tx.init(tree))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tree
    )
    one = jax.jit(lambda x: tx.update({"kernel": x}, ())[0]["kernel"])
    for layer, x in zip(
        got["layers"]["mlp"]["kernel"], tree["layers"]["mlp"]["kernel"], strict=True
    ):
        assert_follows(layer, one(x), 1e-3)
    heads = tree["attention"]["query"]["kernel"].reshape(6, 8)
    assert_follows(got["attention"]["query"]["kernel"].reshape(6, 8), one(heads), 1e-3)
    np.testing.assert_array_equal(got["bias"], tree["bias"])
    assert not got["nothing"]["kernel"].any()
