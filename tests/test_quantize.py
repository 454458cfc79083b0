"""8-bit state: codes are the nearest of the book, and optimizers agree to its precision."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol
from optax_lowrank import quantize

SHAPES = {"kernel": (64, 96), "bias": (96,)}


def tree(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {k: jnp.asarray(random.standard_normal(s), jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("signed", [True, False])
def test_code_book(signed):
    book = np.array(quantize.code_book(signed))
    assert book.size == 256
    assert np.all(np.diff(book) > 0)
    assert np.min(np.abs(book[book != 0])) == pytest.approx(5.5e-7 if signed else 3.25e-7)
    assert book[0] == (pytest.approx(-0.99296875) if signed else 0)
    assert book[-1] == 1


arrays = hypothesis.extra.numpy.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.floats(-8, 8, width=32)
)


@hypothesis.given(x=arrays, signed=st.booleans(), block=st.integers(1, 10))
def test_each_entry_gets_the_nearest_code_of_its_block(x, signed, block):
    x = x if signed else np.abs(x)
    codes, scale = quantize.encode(jnp.asarray(x), signed, block)
    assert codes.shape == x.shape
    assert scale.shape == (x.shape[0], -(-x.shape[1] // block))
    back = np.asarray(quantize.decode(codes, scale, signed, block))
    unit = np.repeat(np.asarray(scale), block, axis=1)[:, : x.shape[1]]
    distance = np.abs(x[..., None] - unit[..., None] * np.array(quantize.code_book(signed)))
    # the one exception: a positive entry never becomes the 0 of an unsigned book; float32 rounds ties either way
    lost = np.where(~np.bool_(signed) & (x > 0), 3.25e-7 * unit, 0) + 1e-6 * unit
    assert np.all(np.abs(back - x) <= distance.min(axis=-1) + lost)
    assert np.all(back * x >= 0)
    if not signed:
        assert np.all((codes > 0) | (x == 0))


def test_zeros_and_what_is_not_finite():
    codes, scale = quantize.encode(jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, -2.0]]))
    assert quantize.decode(codes, scale).tolist() == [
        [0.0, 0.0],
        [0.0, 1.0],
        [0.0, pytest.approx(-1.985937, abs=1e-5)],
    ]


def run(tx, steps=6):
    params, update = tree(0), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(steps):
        updates, state = update(tree(1 + step), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


@pytest.mark.parametrize(
    "moments", [optax.scale_by_adam(), optax.trace(0.9), ol.scale_by_rotated_adam()]
)
def test_wrapped_transformation_agrees_to_the_precision_of_the_codes(moments):
    (exact, _), (coded, state) = (
        run(optax.chain(m, optax.scale(-0.1))) for m in (moments, ol.quantize_state(moments))
    )
    steps = jax.tree.map(lambda a, start: jnp.linalg.norm(a - start), exact, tree(0))
    errors = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b), exact, coded)
    assert (
        0 < errors["kernel"] < 0.05 * steps["kernel"]
    )  # codes err by up to 10 % an entry, with either sign
    assert errors["bias"] == 0  # too small for codes
    large = [x for x in jax.tree.leaves(state) if x.size == 64 * 96]
    assert [x.dtype for x in large] == [jnp.uint8] * len(large) != []


@pytest.mark.parametrize(
    "alias", ["galore", "fira", "natural_galore", "adarankgrad", "gradnormlorp"]
)
def test_state_bits_of_every_alias(alias):
    shapes = {"kernel": (128, 344), "embedding": (64, 128)}
    make = lambda bits: getattr(ol, alias)(0.01, rank=64, state_bits=bits, fit=ol.svd())
    params = tree(0, shapes)
    reports = [ol.memory_report(make(bits), params) for bits in (None, 8)]
    tx = make(8)
    updates, state = jax.jit(tx.update)(tree(1, shapes), tx.init(params), params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == reports[1].state
    assert reports[1].state < 0.7 * reports[0].state
    assert {x.dtype for x in jax.tree.leaves(state)} >= {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.uint8),
    }


def test_a_bad_gradient_leaves_codes_and_scales_alone():
    tx = ol.low_rank(ol.quantize_state(optax.scale_by_adam(), min_size=1), rank=8, fit=ol.svd())
    grads = {"kernel": tree(1)["kernel"]}
    _, before = tx.update(grads, tx.init(grads))
    bad = {"kernel": grads["kernel"].at[3, 4].set(jnp.nan)}
    updates, after = tx.update(bad, before)
    assert not jnp.any(updates["kernel"])
    np.testing.assert_array_equal(
        before.inner.inner.mu["kernel/R"], after.inner.inner.mu["kernel/R"]
    )
    for path, scale in before.inner.block_scale.items():
        np.testing.assert_array_equal(scale, after.inner.block_scale[path])


def test_compaction_cuts_codes():
    grads = {"kernel": tree(1, {"a": (64, 4)})["a"] @ tree(2, {"a": (4, 96)})["a"]}
    fit = ol.adaptive_rank(ol.svd(), 1e-6, min_rank=4, rank_step=4)  # a gradient of rank 4
    tx = ol.low_rank(ol.quantize_state(ol.scale_by_rotated_adam(), min_size=1), rank=16, fit=fit)
    _, state = tx.update(grads, tx.init(grads))
    small = ol.compact(tx, state, grads, multiple_of=4)
    assert small.inner.inner.mu["kernel/R"].shape == (1, 4, 96)
    assert small.inner.inner.mu["kernel/R"].dtype == jnp.uint8
    np.testing.assert_array_equal(
        tx.update(grads, state)[0]["kernel"], tx.update(grads, small)[0]["kernel"]
    )


@pytest.mark.parametrize("arguments", [{"bits": 4}, {"block_size": 0}])
def test_errors(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ol.quantize_state(optax.scale_by_adam(), **arguments)
