"""Optimizer state in 8 bits, for any Optax transformation: decoded, updated, encoded again, leaf after leaf."""

import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.codes import decode, encode
from optax_lowrank.in_turn import in_turn
from optax_lowrank.moments import scale_by_rotated_adam
from optax_lowrank.views import flatten_by_path, leaf_path, owner


class QuantizedState(NamedTuple):
    """State of `quantize_state`."""

    inner: optax.OptState  # the state of `inner`, large float arrays as uint8 codes of their shape
    block_scale: dict[
        str, jax.Array
    ]  # (..., blocks) float32 by the array's path in `inner`: who is here is in codes
    count: Any = optax.MaskedNode()  # () int32, updates so far; only where rounding is stochastic


def quantize_state(
    inner: optax.GradientTransformation,
    bits: Literal[8] = 8,
    block_size: int = 256,
    min_size: int = 4096,
    unsigned: tuple[str, ...] = ("nu",),
    stochastic: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the large float arrays of the state of `inner` as 8-bit codes with one float32 scale a block.

    On each update the state is decoded, `inner` computes from the decoded moments, the update from its new unquantized
    ones, and these are encoded again; the next leaf waits for that, so that only one leaf's moments are in full
    precision at a time. State: 1 + 4 / block_size bytes a number instead of 4.

    Args:
      inner: any transformation.
      bits: 8.
      block_size: entries along the last axis that share a scale.
      min_size: arrays with fewer entries stay as they are.
      unsigned: names of the state fields that are never negative.
      stochastic: round to either neighbour, such that the mean over steps is exact; nearest otherwise. A moment that
        changes by less than half a bin a step then still moves. The error bound is one bin instead of half.
      seed: of stochastic rounding.

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
      others commutes with quantization; theirs run over the flat array. Theirs rounds to nearest.
    """
    if bits != 8:
        raise ValueError(f"`bits` must be 8, got {bits!r}.")
    if block_size < 1:
        raise ValueError(f"`block_size` must be positive, got {block_size}.")
    inner = optax.with_extra_args_support(inner)
    is_signed = lambda key_path: (
        not {getattr(part, "name", None) for part in key_path} & set(unsigned)
    )

    def pack(state, chosen, counts) -> tuple[Any, dict[str, jax.Array]]:
        scales = {}

        def leaf(key_path, x):
            path = leaf_path(key_path)
            if not chosen(path, x):
                return x
            noise = None
            if path in counts:
                key = jax.random.fold_in(jax.random.key(seed), counts[path])
                key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                noise = jax.random.uniform(key, x.shape)
            codes, scales[path] = encode(x, is_signed(key_path), block_size, noise)
            return codes

        return jax.tree_util.tree_map_with_path(leaf, state), scales

    def unpack(coded, scales):
        def leaf(key_path, x):
            path = leaf_path(key_path)
            return decode(x, scales[path], is_signed(key_path), block_size) if path in scales else x

        return jax.tree_util.tree_map_with_path(leaf, coded)

    def init(params):
        count = jnp.zeros([], jnp.int32) if stochastic else optax.MaskedNode()
        if not jax.tree.leaves(
            params
        ):  # as in `low_rank`: a scalar where `optax.tree_map_params` finds no parameters
            return QuantizedState(inner.init(params), jnp.zeros([]), count)
        large = lambda _, x: (
            x.size >= min_size and x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)
        )
        return QuantizedState(*pack(inner.init(params), large, {}), count)

    def update(updates, state, params=None, **extra):
        if not isinstance(state.block_scale, dict):
            out, new = inner.update(updates, state.inner, params, **extra)
            return out, state._replace(inner=new)

        def step(argument):
            coded, scales, counts = argument
            out, new = inner.update(updates, unpack(coded, scales), params, **extra)
            return out, pack(new, lambda path, _: path in scales, counts)

        counts, count = {}, state.count
        if stochastic:  # a count an array, so that its noise too waits for the leaf before
            counts, count = dict.fromkeys(state.block_scale, count), optax.safe_increment(count)
        leaves, _ = flatten_by_path(updates)
        of_leaf = lambda key_path: owner(key_path, leaves)
        out, new = in_turn(step, (state.inner, state.block_scale, counts), of_leaf)
        return out, QuantizedState(*new, count)

    return optax.GradientTransformationExtraArgs(init, update)


# 8, or the arguments of `quantize_state`, as the aliases take them.
StateBits = Literal[8] | Mapping[str, Any] | None


def adam_moments(
    b1, b2, eps, mu_dtype=None, rotate: bool = False, state_bits: StateBits = None
) -> optax.GradientTransformation:
    """The Adam of the aliases: `scale_by_rotated_adam` or Optax's, its moments in 8 bits on request."""
    adam = scale_by_rotated_adam if rotate else optax.scale_by_adam
    return in_bits(adam(b1, b2, eps, mu_dtype=mu_dtype), state_bits)


def in_bits(tx: optax.GradientTransformation, state_bits: StateBits):
    """`tx` with its state in so many bits; None leaves it alone."""
    if state_bits is None:
        return tx
    options = state_bits if isinstance(state_bits, Mapping) else {"bits": state_bits}
    return quantize_state(tx, **options)
