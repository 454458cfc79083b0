"""Optimizer state in 8 or 4 bits, for any Optax transformation: decoded, updated, encoded again, leaf after leaf."""

from typing import Literal

import optax

from optax_lowrank.rules import OfRule, Rule, in_codes, of_rule


def quantize_state(
    inner: optax.GradientTransformation | Rule,
    bits: Literal[8, 4] = 8,
    block_size: int | None = None,
    min_size: int = 4096,
    unsigned: tuple[str, ...] = ("nu",),
    stochastic: bool = False,
    seed: int = 0,
) -> OfRule:
    """Keeps the large float arrays of the state of `inner` as codes of 8 or 4 bits with one float32 scale a block.

    On each update the state is decoded, `inner` computes from the decoded moments, the update from its new unquantized
    ones, and these are encoded again; the next leaf waits for that, so that only one leaf's moments are in full
    precision at a time. State: 1 + 4 / block_size bytes a number instead of 4, or 1/2 + 4 / block_size.

    `inner` sees one leaf at a time, and inside `low_rank` the coordinates of one matrix: what looks at several
    leaves, as a global norm does, belongs outside.

    Args:
      inner: any transformation, or a rule.
      bits: 8, a dynamic book of seven decades; or 4, quantiles of a normal distribution, sixteenths for unsigned
        arrays.
      block_size: entries along the last axis that share a scale; default 256, with 4 bits 128.
      min_size: arrays with fewer entries stay as they are.
      unsigned: names of the state fields that are never negative.
      stochastic: round to either neighbour, such that the mean over steps is exact; nearest otherwise. A moment that
        changes by less than half a bin a step then still moves. The error bound is one bin instead of half.
      seed: of stochastic rounding.

    Returns:
      A transformation with the updates of `inner`, to the precision of the code book.

    Raises:
      ValueError: `bits` is neither 8 nor 4, or `block_size` not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> state = jax.eval_shape(ol.quantize_state(optax.scale_by_adam()).init, shapes).leaves["kernel"]
      >>> state.inner.mu.dtype, state.block_scale["mu"].shape
      (dtype('uint8'), (1024, 4))

    Reference: Dettmers et al., arXiv:2110.02861. Blocks run along the last axis, so that slicing and sharding the
      others commutes with quantization; theirs run over the flat array. Theirs rounds to nearest.
    """
    return of_rule(in_codes(inner, bits, block_size, min_size, unsigned, stochastic, seed))
