"""State in 8 and 4 bits: codes are the nearest of the book, and optimizers agree to its precision."""

import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol
from optax_lowrank import codes

from .helpers import low_rank_state

SHAPES = {"kernel": (64, 96), "bias": (96,)}


def tree(seed, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {k: jnp.asarray(random.standard_normal(s), jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("signed", [True, False])
def test_code_book(signed):
    book = np.array(codes.code_book(signed))
    assert book.size == 256
    assert np.all(np.diff(book) > 0)
    assert np.min(np.abs(book[book != 0])) == pytest.approx(5.5e-7 if signed else 3.25e-7)
    assert book[0] == (pytest.approx(-0.99296875) if signed else 0)
    assert book[-1] == 1


# Few sizes, since each is compiled.
arrays = hypothesis.extra.numpy.arrays(
    np.float32, st.sampled_from([(3, 1), (2, 9)]), elements=st.floats(-8, 8, width=32)
)
blocks = st.sampled_from([1, 4, 10])
encode = jax.jit(codes.encode, static_argnums=(1, 2))
decode = jax.jit(codes.decode, static_argnums=(2, 3))


@hypothesis.given(x=arrays, signed=st.booleans(), block=blocks)
def test_each_entry_gets_the_nearest_code_of_its_block(x, signed, block):
    x = x if signed else np.abs(x)
    numbers, scale = encode(x, signed, block)
    assert numbers.shape == x.shape
    assert scale.shape == (x.shape[0], -(-x.shape[1] // block))
    back = np.asarray(decode(numbers, scale, signed, block))
    unit = np.repeat(np.asarray(scale), block, axis=1)[:, : x.shape[1]]
    distance = np.abs(x[..., None] - unit[..., None] * np.array(codes.code_book(signed)))
    # the one exception: a positive entry never becomes the 0 of an unsigned book; float32 rounds ties either way
    lost = np.where(~np.bool_(signed) & (x > 0), 3.25e-7 * unit, 0) + 1e-6 * unit
    assert np.all(np.abs(back - x) <= distance.min(axis=-1) + lost)
    assert np.all(back * x >= 0)
    if not signed:
        assert np.all((numbers > 0) | (unit * x == 0))


@hypothesis.given(x=arrays, signed=st.booleans(), block=blocks, seed=st.integers(0, 9))
def test_stochastic_rounding_errs_by_less_than_one_bin(x, signed, block, seed):
    x = x if signed else np.abs(x)
    noise = np.random.default_rng(seed).random(x.shape, np.float32)
    numbers, scale = encode(x, signed, block, noise)
    unit = np.repeat(np.asarray(scale), block, axis=1)[:, : x.shape[1]]
    back = np.asarray(decode(numbers, scale, signed, block))
    book = unit[..., None] * np.array(codes.code_book(signed))
    exact = np.clip(x, book[..., 0], None) * (unit > 0)  # there is no −1 in the book
    slack = 1e-6 * unit
    # a number that is, but for rounding, in the book may become either neighbour
    below = np.where(book <= (exact - slack)[..., None], book, -np.inf).max(axis=-1)
    above = np.where(book >= (exact + slack)[..., None], book, np.inf).min(axis=-1)
    lost = np.where(~np.bool_(signed) & (x > 0), 3.25e-7 * unit, 0)
    assert np.all((back >= below - slack) & (back <= np.maximum(above, lost) + slack))
    assert np.all(back[x == 0] == 0)
    assert np.all(back * x >= 0)


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_is_exact_in_the_mean(signed):
    x = jnp.array([1.0, 0.2345, 0.0123, 0.00456, -0.0345 if signed else 0.0345, 3e-4])
    many = jnp.broadcast_to(x, (40_000, 6))
    noise = jax.random.uniform(jax.random.key(0), many.shape)
    back = codes.decode(*codes.encode(many, signed, 8, noise), signed, 8)
    nearest = codes.decode(*codes.encode(x, signed, 8), signed, 8)
    error = jnp.std(back, axis=0) / 200  # of a mean of 40,000
    assert jnp.all(jnp.abs(jnp.mean(back, axis=0) - x) <= 4 * error + 1e-6 * jnp.abs(x))
    assert jnp.max(jnp.abs(nearest / x - 1)) > 5e-3  # which rounding to nearest is not


def test_zeros_and_what_is_not_finite():
    numbers, scale = codes.encode(jnp.array([[0.0, 0.0], [jnp.nan, 1.0], [jnp.inf, -2.0]]))
    assert codes.decode(numbers, scale).tolist() == [
        [0.0, 0.0],
        [0.0, 1.0],
        [0.0, pytest.approx(-1.985937, abs=1e-5)],
    ]


# Four bits

sixteen = {signed: np.array(codes._sixteen(signed), np.float32) for signed in (True, False)}


@functools.cache
def four(n, signed, noisy):
    """Encode and decode rows of n numbers in blocks of 4."""
    book = codes.Book(4, 4)

    def round_trip(x, noise):
        numbers, scale = book.encode(x, signed, noise if noisy else None)
        return numbers, scale, book.decode(numbers, scale, signed)

    return jax.jit(round_trip)


@hypothesis.given(x=arrays, signed=st.booleans(), noisy=st.booleans(), seed=st.integers(0, 9))
def test_four_bits_round_to_a_neighbour(x, signed, noisy, seed):
    """To the nearest, or with noise to either; rows of odd length have a byte a number."""
    x = np.pad(x if signed else np.abs(x), ((0, 0), (0, 1 + seed % 2)))
    n = x.shape[1]
    noise = np.random.default_rng(seed).random(x.shape, np.float32)
    numbers, scale, back = (np.asarray(y) for y in four(n, signed, noisy)(x, noise))
    assert (numbers.shape[1], numbers.dtype) == ((n, np.int8) if n % 2 else (n // 2, np.uint8))
    assert scale.shape == (x.shape[0], -(-n // 4))
    unit = np.repeat(scale, 4, axis=1)[:, :n]
    book = unit[..., None] * sixteen[signed]
    slack = 1e-6 * unit
    if not noisy:
        assert np.all(np.abs(back - x) <= np.abs(x[..., None] - book).min(axis=-1) + slack)
    # no value of the book lies strictly between an entry and what became of it
    inside = np.clip(x, book[..., 0], book[..., -1])
    low, high = np.minimum(inside, back) + slack, np.maximum(inside, back) - slack
    assert not np.any((book > low[..., None]) & (book < high[..., None]))
    assert signed or np.all((back > 0) == (unit > 0))  # a second moment is never lost


@pytest.mark.parametrize("signed", [True, False])
def test_four_bits_are_exact_in_the_mean(signed):
    x = jnp.array(
        [1.0, 0.2345, 0.1123, 0.0856, -0.3345 if signed else 0.3345]
    )  # a row of odd length
    many = jnp.broadcast_to(x, (40_000, 5))
    book = codes.Book(4, 8)
    back = book.decode(
        *book.encode(many, signed, jax.random.uniform(jax.random.key(0), many.shape)), signed
    )
    error = jnp.std(back, axis=0) / 200  # of a mean of 40,000
    assert jnp.all(jnp.abs(jnp.mean(back, axis=0) - x) <= 4 * error + 1e-6 * jnp.abs(x))
    nearest = book.decode(*book.encode(x, signed), signed)
    assert jnp.max(jnp.abs(nearest / x - 1)) > 0.05  # which rounding to nearest is not


# Transformations


def run(tx, steps=6, shapes=SHAPES):
    params, update = tree(0, shapes), jax.jit(tx.update)
    state = tx.init(params)
    for step in range(steps):
        updates, state = update(tree(1 + step, shapes), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


@pytest.mark.parametrize("shape", [(64, 96), (96, 65)], ids=str)
@pytest.mark.parametrize(("bits", "precision"), [(8, 0.05), (4, 0.4)])
@pytest.mark.parametrize(
    "moments", [optax.scale_by_adam(), optax.trace(0.9)], ids=["adam", "trace"]
)
def test_wrapped_transformation_agrees_to_the_precision_of_the_codes(
    moments, bits, precision, shape
):
    shapes = {"kernel": shape, "bias": (96,)}
    (exact, _), (coded, state) = (
        run(optax.chain(m, optax.scale(-0.1)), shapes=shapes)
        for m in (moments, ol.quantize_state(moments, bits=bits))
    )
    steps = jax.tree.map(lambda a, start: jnp.linalg.norm(a - start), exact, tree(0, shapes))
    errors = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b), exact, coded)
    assert 0 < errors["kernel"] < precision * steps["kernel"]
    assert errors["bias"] <= 1e-5 * steps["bias"]  # too small for codes
    small = state[0].leaves["kernel"]
    size, odd = shape[0] * shape[1], shape[1] % 2
    kept = [x for x in jax.tree.leaves(small.inner) if x.ndim]
    assert len(kept) == len(small.block_scale) > 0
    assert {x.nbytes for x in kept} == {size // 2 if bits == 4 and not odd else size}


@pytest.mark.parametrize(
    "alias", ["galore", "fira", "natural_galore", "adarankgrad", "gradnormlorp"]
)
def test_state_bits_of_every_alias(alias):
    shapes = {"kernel": (128, 344), "embedding": (64, 128)}
    make = lambda bits: getattr(ol, alias)(0.01, rank=64, state_bits=bits, fit=ol.svd())
    params = tree(0, shapes)
    reports = [ol.memory_report(make(bits), params) for bits in (None, 8)]
    _, state = jax.eval_shape(make(8).update, params, jax.eval_shape(make(8).init, params), params)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == reports[1].state
    assert reports[1].state < 0.7 * reports[0].state
    assert {x.dtype for x in jax.tree.leaves(state)} >= {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.uint8),
    }


def test_a_bad_gradient_leaves_codes_and_scales_alone():
    tx = ol.low_rank(ol.quantize_state(optax.scale_by_adam(), min_size=1), rank=8, fit=ol.svd())
    grads = {"kernel": tree(1)["kernel"]}
    update = jax.jit(tx.update)
    _, before = update(grads, tx.init(grads))
    bad = {"kernel": grads["kernel"].at[3, 4].set(jnp.nan)}
    updates, after = update(bad, before)
    assert not jnp.any(updates["kernel"])
    np.testing.assert_array_equal(
        before.leaves["kernel"].rule.inner.mu, after.leaves["kernel"].rule.inner.mu
    )
    for path, scale in before.leaves["kernel"].rule.block_scale.items():
        np.testing.assert_array_equal(scale, after.leaves["kernel"].rule.block_scale[path])


def test_compaction_cuts_codes():
    grads = {"kernel": tree(1, {"a": (64, 4)})["a"] @ tree(2, {"a": (4, 96)})["a"]}
    fit = ol.adaptive_rank(ol.svd(), 1e-6, min_rank=4, rank_step=4)  # a gradient of rank 4
    tx = ol.low_rank(ol.quantize_state(ol.scale_by_rotated_adam(), min_size=1), rank=16, fit=fit)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(grads))
    small = ol.compact(tx, state, grads, multiple_of=4)
    mu = small.leaves["kernel"].rule.inner.mu
    assert (mu.shape, mu.dtype) == ((1, 4, 96), jnp.uint8)
    np.testing.assert_array_equal(
        update(grads, state)[0]["kernel"], update(grads, small)[0]["kernel"]
    )


def test_a_block_below_the_normal_numbers_is_zero():
    numbers, scale = codes.encode(jnp.array([[1e-39, 0.0]]), signed=False)
    assert codes.decode(numbers, scale, signed=False).tolist() == [[0.0, 0.0]]


def test_stochastic_rounding_lets_a_small_change_through():
    def update(updates, x, params=None):
        del params
        return updates, jax.tree.map(lambda x: x * jnp.full_like(x, 0.999).at[..., 0].set(1.0), x)

    halves = lambda params: jnp.full_like(params, 0.5).at[..., 0].set(1.0)
    decay = optax.GradientTransformation(halves, update)
    start = {"w": jnp.zeros((64, 64))}

    def decayed(tx):
        state, update = tx.init(start), jax.jit(tx.update)
        for _ in range(50):
            _, state = update(start, state)
        assert update._cache_size() == 1
        coded = state.leaves["w"]
        (scale,) = coded.block_scale.values()
        return codes.decode(coded.inner, scale)[:, 1:], coded

    stuck, without_count = decayed(ol.quantize_state(decay, min_size=1))
    moving, with_count = decayed(ol.quantize_state(decay, min_size=1, stochastic=True))
    assert jnp.all(stuck == stuck[0, 0])
    assert jnp.abs(stuck[0, 0] - 0.5) < 0.01
    # the standard deviation of an entry is the root of the sum of p (1 − p) bin², about 0.01
    assert jnp.abs(jnp.mean(moving) - 0.5 * 0.999**50) < 1e-3
    assert with_count.count == 50
    assert len(jax.tree.leaves(with_count)) == len(jax.tree.leaves(without_count)) + 1


@pytest.mark.parametrize(("stochastic", "most"), [(False, 5), (True, 16)])
def test_temporaries_are_those_of_one_leaf(stochastic, most):
    """Decoded, the moments of these eight matrices would be sixteen, and their noise as many again."""
    params = {f"{i}": jax.ShapeDtypeStruct((256, 512), jnp.float32) for i in range(8)}
    tx = ol.quantize_state(optax.scale_by_adam(), stochastic=stochastic)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    assert step.memory_analysis().temp_size_in_bytes < most * 4 * 256 * 512


def test_prints_in_the_inner_transformation_survive(capsys):
    def update(updates, state, params=None):
        jax.debug.print("norm {}", optax.tree.norm(updates))
        return updates, state

    noisy = optax.chain(
        optax.GradientTransformation(lambda _: optax.EmptyState(), update), optax.trace(0.9)
    )
    tx = ol.quantize_state(noisy)
    jax.block_until_ready(jax.jit(tx.update)(tree(0), tx.init(tree(0))))
    jax.effects_barrier()
    assert "norm" in capsys.readouterr().out


def test_arguments_of_quantize_state_through_an_alias():
    params = {"kernel": tree(0)["kernel"]}
    options = {"min_size": 64, "block_size": 32, "stochastic": True}
    tx = ol.galore(0.01, rank=4, state_bits=options)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    coded = low_rank_state(state).leaves["kernel"].rule
    assert coded.inner.mu.dtype == jnp.uint8
    assert coded.block_scale["mu"].shape == (1, 4, 3)
    assert coded.count.tolist() == [1]
    plain = ol.galore(0.01, rank=4, state_bits=8).init(params)
    assert low_rank_state(plain).leaves["kernel"].rule.block_scale == {}  # 384 entries


@pytest.mark.parametrize("arguments", [{"bits": 2}, {"block_size": 0}])
def test_errors(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ol.quantize_state(optax.scale_by_adam(), **arguments)
