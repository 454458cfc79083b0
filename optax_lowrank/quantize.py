"""Optimizer state in 8 bits: block-wise codes of a dynamic code book, for any Optax transformation.

A block is up to `block_size` neighbours along the last axis, x = s · book[code] with s the largest magnitude in the
block. The book has seven decades with ever more values towards 1, so that the relative error is small for large
entries and tiny ones still have a code.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.moments import scale_by_rotated_adam
from optax_lowrank.views import leaf_path


class QuantizedState(NamedTuple):
    """State of `quantize_state`."""

    inner: optax.OptState  # the state of `inner`, large float arrays as uint8 codes of their shape
    block_scale: dict[
        str, jax.Array
    ]  # (..., blocks) float32 by the array's path in `inner`: who is here is in codes


@functools.cache
def code_book(signed: bool) -> tuple[float, ...]:
    """The 256 values of a code, ascending, in [-1, 1] or [0, 1].

    Decade i of seven holds 2^i bins (twice as many unsigned) of [0.1, 1], midpoints times 10^(i − 6), with either sign;
    then 0 and 1. The smallest magnitude is 5.5e-7, or 3.25e-7 unsigned.

    Reference: Dettmers et al., arXiv:2110.02861, dynamic tree quantization.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        bins = 2**decade * (1 if signed else 2)
        middles = [(0.1 + 0.9 * (i + 0.5) / bins) * 10.0 ** (decade - 6) for i in range(bins)]
        values += middles + [-x for x in middles if signed]
    return tuple(sorted(values))


def encode(x: jax.Array, signed: bool = True, block_size: int = 256) -> tuple[jax.Array, jax.Array]:
    """Codes of an array, each the nearest in its block's book.

    A positive entry never gets the code 0 of an unsigned book: a second moment that is lost divides by eps alone.
    Entries that are not finite count as 0.

    Args:
      x: (..., n) float array.
      signed: which book.
      block_size: entries that share a scale.

    Returns:
      (..., n) uint8 codes and (..., ⌈n / block_size⌉) float32 scales; a block of zeros has scale 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import quantize
      >>> codes, scale = quantize.encode(jnp.array([-4.0, 0.0, 0.3, 4.0]))
      >>> print([f"{x:.2f}" for x in quantize.decode(codes, scale)])
      ['-3.97', '0.00', '0.30', '4.00']
    """
    x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
    scale = jnp.max(jnp.abs(_blocks(x, block_size)), axis=-1)
    book = jnp.array(code_book(signed), jnp.float32)
    unit = x / _spread(jnp.where(scale > 0, scale, 1), x.shape, block_size)
    codes = jnp.searchsorted((book[1:] + book[:-1]) / 2, unit).astype(jnp.uint8)
    return (
        codes if signed else jnp.where((x > 0) & (codes == 0), 1, codes).astype(jnp.uint8)
    ), scale


def decode(
    codes: jax.Array, scale: jax.Array, signed: bool = True, block_size: int = 256
) -> jax.Array:
    """The float32 array of codes: book[code] · scale of its block. See `encode`."""
    return jnp.array(code_book(signed), jnp.float32)[codes] * _spread(
        scale, codes.shape, block_size
    )


def _blocks(x, block_size):
    padding = -x.shape[-1] % block_size
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return padded.reshape(*x.shape[:-1], -1, block_size)


def _spread(scale, shape, block_size):
    """(..., blocks) to one number an entry, (..., n)."""
    return jnp.repeat(scale, block_size, axis=-1)[..., : shape[-1]]


def quantize_state(
    inner: optax.GradientTransformation,
    bits: Literal[8] = 8,
    block_size: int = 256,
    min_size: int = 4096,
    unsigned: tuple[str, ...] = ("nu",),
) -> optax.GradientTransformationExtraArgs:
    """Keeps the large float arrays of the state of `inner` as 8-bit codes with one float32 scale a block.

    On each update the state is decoded, `inner` computes from the decoded moments, the update from its new unquantized
    ones, and these are encoded again. State: 1 + 4 / block_size bytes a number instead of 4.

    Args:
      inner: any transformation.
      bits: 8.
      block_size: entries along the last axis that share a scale.
      min_size: arrays with fewer entries stay as they are.
      unsigned: names of the state fields that are never negative.

    Returns:
      A transformation with the updates of `inner`, to the precision of the code book.

    Raises:
      ValueError: `bits` is not 8, or `block_size` not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> state = jax.eval_shape(ol.quantize_state(optax.scale_by_adam()).init, shapes)
      >>> state.inner.mu["kernel"].dtype, state.block_scale["mu/kernel"].shape
      (dtype('uint8'), (1024, 4))

    Reference: Dettmers et al., arXiv:2110.02861. Blocks run along the last axis, so that slicing and sharding the
      others commutes with quantization; theirs run over the flat array.
    """
    if bits != 8:
        raise ValueError(f"`bits` must be 8, got {bits!r}.")
    if block_size < 1:
        raise ValueError(f"`block_size` must be positive, got {block_size}.")
    inner = optax.with_extra_args_support(inner)
    is_signed = lambda key_path: (
        not {getattr(part, "name", None) for part in key_path} & set(unsigned)
    )

    def pack(state, chosen) -> QuantizedState:
        scales = {}

        def leaf(key_path, x):
            path = leaf_path(key_path)
            if not chosen(path, x):
                return x
            codes, scales[path] = encode(x, is_signed(key_path), block_size)
            return codes

        return QuantizedState(jax.tree_util.tree_map_with_path(leaf, state), scales)

    def init(params):
        if not jax.tree.leaves(
            params
        ):  # as in `low_rank`: a scalar where `optax.tree_map_params` finds no parameters
            return QuantizedState(inner.init(params), jnp.zeros([]))
        large = lambda _, x: (
            x.size >= min_size and x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)
        )
        return pack(inner.init(params), large)

    def update(updates, state, params=None, **extra):
        scales = state.block_scale
        if not isinstance(scales, dict):
            out, new = inner.update(updates, state.inner, params, **extra)
            return out, QuantizedState(new, scales)

        def leaf(key_path, x):
            path = leaf_path(key_path)
            return decode(x, scales[path], is_signed(key_path), block_size) if path in scales else x

        decoded = jax.tree_util.tree_map_with_path(leaf, state.inner)
        out, new = inner.update(updates, decoded, params, **extra)
        return out, pack(new, lambda path, _: path in scales)

    return optax.GradientTransformationExtraArgs(init, update)


def adam_moments(
    b1, b2, eps, mu_dtype=None, rotate: bool = False, state_bits: Literal[8] | None = None
) -> optax.GradientTransformation:
    """The Adam of the aliases: `scale_by_rotated_adam` or Optax's, its moments in 8 bits on request."""
    adam = scale_by_rotated_adam if rotate else optax.scale_by_adam
    return in_bits(adam(b1, b2, eps, mu_dtype=mu_dtype), state_bits)


def in_bits(tx: optax.GradientTransformation, state_bits: Literal[8] | None):
    """`tx` with its state in so many bits; None leaves it alone."""
    return tx if state_bits is None else quantize_state(tx, state_bits)


def basis_dtype(state_bits: Literal[8] | None) -> Any:
    """Dtype of the bases that goes with 8-bit moments: bfloat16; None for that of the coordinates."""
    return None if state_bits is None else jnp.bfloat16
