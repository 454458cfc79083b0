"""Block-wise codes: arrays in 8 bits a number, in a dynamic code book, or in 4.

A block is up to `block_size` neighbours along the last axis, x = s · book[code] with s the largest magnitude in the
block. The book has seven decades with ever more values towards 1, so that the relative error is small for large
entries and tiny ones still have a code. Codes are computed, not looked up: a search in a table of 256 is many times
slower, and what is elementwise XLA fuses with the arithmetic around it.
"""

import dataclasses
import functools
import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DECADES = 7


@functools.cache
def code_book(signed: bool) -> tuple[float, ...]:
    """The 256 values of a code, ascending, in [-1, 1] or [0, 1].

    Decade i of seven holds 2^i bins (twice as many unsigned) of [0.1, 1], midpoints times 10^(i − 6), with either sign;
    then 0 and 1. The smallest magnitude is 5.5e-7, or 3.25e-7 unsigned.

    Reference: Dettmers et al., arXiv:2110.02861, dynamic tree quantization.
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        bins = _bins(decade, signed)
        middles = [(0.1 + 0.9 * (i + 0.5) / bins) * 10.0 ** (decade - 6) for i in range(bins)]
        values += middles + [-x for x in middles if signed]
    return tuple(sorted(values))


def _bins(decade, signed):
    return 2 ** (decade if signed else decade + 1)


def encode(
    x: jax.Array, signed: bool = True, block_size: int = 256, noise: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes of an array, each the nearest in its block's book.

    A positive entry never gets the code 0 of an unsigned book: a second moment that is lost divides by eps alone.
    Entries that are not finite count as 0.

    Args:
      x: (..., n) float array.
      signed: which book.
      block_size: entries that share a scale.
      noise: (..., n), uniform in [0, 1): rounds to either neighbour, with probabilities that make the mean exact.

    Returns:
      (..., n) uint8 codes and (..., ⌈n / block_size⌉) float32 scales; a block of zeros has scale 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import codes
      >>> numbers, scale = codes.encode(jnp.array([-4.0, 0.0, 0.3, 4.0]))
      >>> print([f"{x:.2f}" for x in codes.decode(numbers, scale)])
      ['-3.97', '0.00', '0.30', '4.00']
    """
    unit, scale = in_blocks(x, block_size)
    size = jnp.abs(unit)
    index = _nearest(size, signed)
    last = jnp.where(unit < 0, 127, 128) if signed else 255  # the signed book has 1, but not −1
    index = jnp.minimum(index, last)
    if noise is not None:
        here = _value(index, signed)
        other = jnp.clip(index + jnp.where(size < here, -1, 1), 0, last)
        gap = _value(other, signed) - here  # 0 at the end of the book
        move = noise * jnp.abs(gap) < jnp.abs(size - here)
        index = jnp.where(move, other, index)
    with_sign = jnp.where(unit < 0, 127 - index, 127 + index)
    positive = jnp.where(unit > 0, jnp.maximum(index, 1), 0)
    return (with_sign if signed else positive).astype(jnp.uint8), scale


def decode(
    codes: jax.Array, scale: jax.Array, signed: bool = True, block_size: int = 256, axis: int = -1
) -> jax.Array:
    """The float32 array of codes: book[code] · scale of its block, which runs along `axis`. See `encode`."""
    index = codes.astype(jnp.float32) - (127 if signed else 0)
    unit = _value(jnp.abs(index), signed) if signed else _value(index, signed)
    unit = jnp.where(index < 0, -unit, unit)
    return unit * spread(scale, codes.shape, block_size, axis)


def in_blocks(x: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """(..., n) to its entries divided by the largest magnitude of their block, in [-1, 1], and these, (..., blocks)."""
    x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block_size)])
    scale = jnp.max(jnp.abs(padded.reshape(*x.shape[:-1], -1, block_size)), axis=-1)
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 0)  # 1 / scale must be finite
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return x * spread(inverse, x.shape, block_size), scale


def spread(scale: jax.Array, shape: tuple[int, ...], block_size: int, axis: int = -1) -> jax.Array:
    """One number a block along `axis` to one an entry of an array of this shape."""
    repeated = jnp.repeat(scale, block_size, axis=axis)
    return lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)


# Of the magnitudes in ascending order, 0 has the index 0, and those of decade i begin at the index
# bins(i) - start(signed), since the bins double from one decade to the next: 1, 2, 4, ... or 2, 4, 8, ...


def _start(signed):
    return 0 if signed else 1


@functools.cache
def _edges(signed):
    """Halfway between the first value of each decade and the value before it; the last edge is that of 1."""
    sizes = [x for x in code_book(signed) if x >= 0]
    firsts = [_bins(i, signed) - _start(signed) for i in range(_DECADES)] + [len(sizes) - 1]
    return [(sizes[first] + sizes[first - 1]) / 2 for first in firsts]


def _nearest(size, signed):
    """Index of the magnitude in the book that is nearest to `size` in [0, 1]; float32, as small integers are exact."""
    edges = _edges(signed)
    bins, slope = jnp.float32(1), jnp.float32(0)
    for decade, edge in enumerate(edges[:-1]):
        count = _bins(decade, signed)
        bins = jnp.where(size > edge, np.float32(count), bins)
        slope = jnp.where(size > edge, np.float32(count * 10.0 ** (6 - decade) / 0.9), slope)
    # bin number floor((size · 10^(6 − i) − 0.1) / 0.9 · bins) of the decade, behind those of the decades below
    index = jnp.clip(jnp.floor(size * slope + bins * np.float32(8 / 9)), bins, 2 * bins - 1)
    index = jnp.where(size > edges[0], index - _start(signed), 0)
    return jnp.where(size > edges[-1], _bins(_DECADES, signed) - _start(signed), index)


def _value(index, signed):
    """Magnitude number `index` of the book, float32."""
    place = index.astype(jnp.float32) + _start(signed)
    # the power of two at or below it, by the exponent of its float32
    bits = lax.bitcast_convert_type(place, jnp.int32) & 0x7F800000
    bins = lax.bitcast_convert_type(bits, jnp.float32)
    inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    unit = np.float32(1e-6)
    for decade in range(1, _DECADES):
        unit = jnp.where(bins >= _bins(decade, signed), np.float32(10.0 ** (decade - 6)), unit)
    value = (np.float32(0.9) * (place + np.float32(0.5)) * inverse - np.float32(0.8)) * unit
    value = jnp.where(place >= _bins(_DECADES, signed), 1, value)
    return jnp.where(index > 0, value, 0)


@dataclasses.dataclass(frozen=True)
class Book:
    """A way to write arrays in 8 or 4 bits a number, one float32 scale a block of neighbours along the last axis.

    8 bits: the dynamic book of `encode`. 4 bits: sixteen quantiles of a normal distribution, 0 among them, for signed
    arrays; sixteenths, 0 not among them, for second moments, of which a lost one divides by eps alone. Two 4-bit
    codes share a byte, the even entry in its lower half; a row of odd length has a byte each, in int8.

    Args:
      bits: 8 or 4.
      block_size: entries that share a scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank.codes import Book
      >>> book = Book(bits=4, block_size=128)
      >>> numbers, scale = book.encode(jnp.array([-4.0, 0.0, 0.3, 4.0]))
      >>> numbers.nbytes, [f"{x:.2f}" for x in book.decode(numbers, scale).tolist()]
      (2, ['-4.00', '0.00', '0.32', '4.00'])

    Reference: Dettmers et al., arXiv:2110.02861 (8 bits) and arXiv:2305.14314 (quantiles); Li et al., arXiv:2309.01507
      (sixteenths without 0).
    """

    bits: int
    block_size: int

    # Jitted, they are traced once a shape, and an eager `init` does not compile their hundred operations one by one.
    @functools.partial(jax.jit, static_argnames=("self", "signed"))
    def encode(
        self, x: jax.Array, signed: bool = True, noise: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Codes and scales of (..., n); with `noise`, uniform in [0, 1), rounding is stochastic and its mean exact."""
        if self.bits == 8:
            return encode(x, signed, self.block_size, noise)
        unit, scale = in_blocks(x, self.block_size)
        return _in_pairs(_nearest_of_16(unit, _sixteen(signed), noise)), scale

    @functools.partial(jax.jit, static_argnames=("self", "signed", "axis"))
    def decode(
        self, codes: jax.Array, scale: jax.Array, signed: bool = True, axis: int = -1
    ) -> jax.Array:
        """The float32 array of codes and scales, whose blocks and pairs run along `axis`."""
        if self.bits == 8:
            return decode(codes, scale, signed, self.block_size, axis)
        unit = _of_16(_from_pairs(codes, axis), _sixteen(signed))
        return unit * spread(scale, unit.shape, self.block_size, axis)


@functools.cache
def _sixteen(signed: bool) -> tuple[float, ...]:
    """The 16 values of a 4-bit code, ascending, in [−1, 1] or (0, 1]."""
    if not signed:
        return tuple(i / 16 for i in range(1, 17))
    normal = statistics.NormalDist()
    tail = 0.9677083  # of the outermost quantile, theirs: the mean of 1 − 1/32 and 1 − 1/30
    half = lambda n: [normal.inv_cdf(tail + (0.5 - tail) * i / n) for i in range(n)]
    positive, negative = half(8), half(7)
    return tuple(x / positive[0] for x in sorted([*positive, 0.0, *(-x for x in negative)]))


def _nearest_of_16(unit, book, noise):
    if noise is None:
        edges = [(a + b) / 2 for a, b in itertools.pairwise(book)]
        return sum((unit > np.float32(edge)).astype(jnp.uint8) for edge in edges)
    below = sum((unit >= np.float32(value)).astype(jnp.uint8) for value in book[1:])
    here = _of_16(below, book)
    # 0 at the end of the book
    gap = _of_16(jnp.minimum(below + np.uint8(1), np.uint8(15)), book) - here
    up = noise * gap < unit - here
    return jnp.minimum(below + up.astype(jnp.uint8), np.uint8(15))


def _of_16(index, book):
    value = jnp.zeros(index.shape, jnp.float32)
    for i, x in enumerate(book):
        value = jnp.where(index == i, np.float32(x), value)
    return value


def _in_pairs(index):
    if index.shape[-1] % 2:
        return index.astype(jnp.int8)
    return index[..., 0::2] | (index[..., 1::2] << 4)


def _from_pairs(codes, axis):
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.uint8)
    axis %= codes.ndim
    both = jnp.stack([codes & 15, codes >> 4], axis=axis + 1)
    return both.reshape(*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
