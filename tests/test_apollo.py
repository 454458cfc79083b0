"""APOLLO: the paper's algorithm, in the bases that were used; what its update is, and its bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import assert_trees_close, low_rank_state, run, turning_gradients
from .reference import apollo as reference


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def trajectory(tx, grads):
    """Updates of one kernel along (steps, ..., m, n) gradients, and the last state."""
    params = {"kernel": jnp.zeros(grads.shape[1:])}
    _, state, updates = run(tx, params, [{"kernel": jnp.asarray(grad)} for grad in grads])
    return np.stack([u["kernel"] for u in updates]), state


def assert_follows(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def bases_of(grads, rank, gap):
    """P (m, r) of each step, by a rule whose step is A = I."""
    show = ol.Rule(
        init=lambda R: (),
        turn=lambda state, turn: state,
        step=lambda R, columns, state: (jnp.eye(*R.shape), None, state),
    )
    tx = ol.low_rank(show, rank=rank, fit=ol.seeded(), refresh=ol.every(gap))
    tall = grads.shape[1] > grads.shape[2]
    shown, _ = trajectory(tx, grads)
    return [(u.T if tall else u)[:, :rank] for u in shown]


@pytest.mark.parametrize(
    ("per", "rank", "shape"),
    [
        ("column", 4, (12, 20)),
        ("column", 4, (20, 12)),
        ("matrix", 1, (12, 20)),
        ("matrix", 2, (15, 15)),
    ],
    ids=str,
)
def test_reference(per, rank, shape):
    """Gradients whose sizes jump, so that the limiter works, over two refreshes."""
    sizes = np.geomspace(1, 4, 14)[:, None, None]
    grads = (turning_gradients(shape) * sizes).astype(np.float32)
    config = {"per": per, "scale": 0.7, "limit": 1.01, "learning_rate": 0.03, "b1": 0.8, "b2": 0.95}
    bases = bases_of(grads, rank, gap=5)
    for P in bases:
        np.testing.assert_allclose(P.T @ P, np.eye(rank), rtol=0, atol=1e-5)
    assert not np.allclose(bases[4], bases[5], atol=0.1)
    got, _ = trajectory(ol.apollo(rank=rank, update_proj_gap=5, **config), grads)
    want = reference.reference(grads, bases, **config)
    assert_follows(got, want, 1e-3)  # float32, and Adam divides by small coordinates
    unlimited = reference.reference(grads, bases, **{**config, "limit": np.inf})
    assert np.abs(unlimited - want).max() > 0.02 * np.abs(want).max()


@pytest.mark.parametrize("per", ["column", "matrix"])
def test_the_update_is_the_gradient_weighed(per):
    """Column by column, or as a whole: no direction that the gradient has not."""
    grads = normal(3, 8, 12)
    got, _ = trajectory(ol.apollo(1.0, rank=2, per=per), grads)
    weights = -got / grads
    spread = weights.max(axis=1) - weights.min(axis=1)
    assert (spread <= 1e-5 * np.abs(weights).max(axis=1)).all()
    assert (weights > 0).all()
    alike = np.ptp(weights[:, 0], axis=1) <= 1e-5 * np.abs(weights).max()
    assert alike.all() == (per == "matrix")


def test_stacked_leaf_is_a_loop_over_its_layers():
    """With limits of their own; the exact fit, as random bases differ between layers."""
    growth = np.array([1.0, 4.0, 0.25], np.float32)[:, None, None]
    stacks = np.stack([normal(3, 8, 6, seed=t) * growth**t for t in range(5)])
    tx = ol.apollo(1.0, rank=2, update_proj_gap=2, fit=ol.svd())
    layers = [trajectory(tx, stacks[:, i])[0] for i in range(3)]
    got, _ = trajectory(tx, stacks)
    for i, layer in enumerate(layers):
        assert_follows(got[:, i], layer, 1e-3)  # two programs; refits amplify rounding


def test_bad_gradients():
    """Zero is no step, NaN is none either, and the next is at full size again."""
    good = normal(3, 8, 12)
    grads = np.stack([good[0], np.full_like(good[0], np.nan), good[1], 0 * good[0], good[2]])
    tx = ol.apollo(1.0, rank=2, limit=1.01)
    got, _ = trajectory(tx, grads)
    norms = np.linalg.norm(got, axis=(1, 2))
    assert np.isfinite(norms).all()
    assert norms[1] == norms[3] == 0
    assert norms[2] <= 1.01 * norms[0] * (1 + 1e-5)
    assert norms[4] > 0.2 * norms[0]


@pytest.mark.parametrize("shape", [(512, 1376), (1376, 512)], ids=str)
def test_bytes(shape):
    """2 n r floats and one more of each matrix, n the long side, of the basis nothing; of Mini 2 n + 1."""
    params = {"layers": {"kernel": jax.ShapeDtypeStruct((24, *shape), jnp.float32)}}
    for rank, per in ((64, "column"), (1, "matrix")):
        tx = ol.apollo(1e-3, rank=rank, per=per)
        report = ol.memory_report(tx, params)
        assert report.arrays + report.counters == sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params))
        )
        assert 0 <= report.arrays - 4 * 24 * 2 * rank * 1376 <= 4 * 24
        leaf = low_rank_state(jax.eval_shape(tx.init, params)).leaves["layers/kernel"]
        assert not jax.tree.leaves(leaf.basis)
        assert leaf.rule.norm.shape == (24,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per": "row"}, '`per` must be "column" or "matrix", got \'row\''),
        ({"limit": 0.9}, r"`limit` must be at least 1, got 0\.9"),
        ({"side": "both"}, '`side` must be "short" or "long" in `apollo`'),
        ({"accumulate": 2}, "`accumulate` must be 1 in `apollo`, got 2"),
    ],
)
def test_options_that_are_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        ol.apollo(0.1, **options)


def test_inside_multi_steps():
    """The remedy that the error for `accumulate` names."""
    grads = normal(4, 8, 12)
    tx = functools.partial(ol.apollo, 1.0, rank=2)
    got, _ = trajectory(optax.MultiSteps(tx(), 2), grads)
    want, _ = trajectory(tx(), (grads[::2] + grads[1::2]) / 2)
    assert_trees_close(got[1::2], want, 1e-3)
