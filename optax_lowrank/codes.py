"""Block-wise codes: arrays in 8 bits a number, in a dynamic code book.

A block is up to `block_size` neighbours along the last axis, x = s · book[code] with s the largest magnitude in the
block. The book has seven decades with ever more values towards 1, so that the relative error is small for large
entries and tiny ones still have a code. Codes are computed, not looked up: a search in a table of 256 is many times
slower, and what is elementwise XLA fuses with the arithmetic around it.
"""

import functools

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
    last = 255
    if signed:
        last = jnp.where(unit < 0, 127, 128)  # the book has 1, but not −1
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
    codes: jax.Array, scale: jax.Array, signed: bool = True, block_size: int = 256
) -> jax.Array:
    """The float32 array of codes: book[code] · scale of its block. See `encode`."""
    index = codes.astype(jnp.float32) - (127 if signed else 0)
    unit = _value(jnp.abs(index), signed) if signed else _value(index, signed)
    unit = jnp.where(index < 0, -unit, unit)
    return unit * spread(scale, codes.shape, block_size)


def in_blocks(x: jax.Array, block_size: int) -> tuple[jax.Array, jax.Array]:
    """(..., n) to its entries divided by the largest magnitude of their block, in [-1, 1], and these, (..., blocks)."""
    x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block_size)])
    scale = jnp.max(jnp.abs(padded.reshape(*x.shape[:-1], -1, block_size)), axis=-1)
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 0)  # 1 / scale must be finite
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return x * spread(inverse, x.shape, block_size), scale


def spread(scale: jax.Array, shape: tuple[int, ...], block_size: int) -> jax.Array:
    """(..., blocks) to one number an entry, (..., n)."""
    return jnp.repeat(scale, block_size, axis=-1)[..., : shape[-1]]


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
