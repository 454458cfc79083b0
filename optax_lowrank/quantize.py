"""Optimizer state in 8 or 4 bits, for any Optax transformation: decoded, updated, encoded again, leaf after leaf."""

import dataclasses
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.codes import Book
from optax_lowrank.rules import OfRule, Rule, as_rule, of_rule, unturned
from optax_lowrank.views import leaf_path


class CodedState(NamedTuple):
    """State of a rule in codes."""

    inner: Any  # of the rule, large float arrays as uint8 codes
    block_scale: dict[str, jax.Array]  # (..., blocks) float32 by path in `inner`
    count: jax.Array | None  # () int32, updates so far; only where rounding is stochastic


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
    if bits not in (8, 4) or isinstance(bits, bool):
        raise ValueError(f"`bits` must be 8 or 4, got {bits!r}.")
    block_size = (256 if bits == 8 else 128) if block_size is None else block_size
    if block_size < 1:
        raise ValueError(f"`block_size` must be positive, got {block_size}.")
    rule, book = as_rule(inner), Book(bits, block_size)
    coded = _InCodes(rule, book, min_size, frozenset(unsigned), stochastic, seed)
    turn = unturned if rule.turn is unturned else coded.turn
    return of_rule(Rule(coded.init, turn, coded.step, rule.recall and coded.recall))


@dataclasses.dataclass(frozen=True)
class _InCodes:
    """The rule of `quantize_state`, whose arguments these are."""

    rule: Rule
    book: Book
    min_size: int
    unsigned: frozenset[str]
    stochastic: bool
    seed: int

    def init(self, R):
        large = lambda _, x: (
            x.ndim > 0 and x.size >= max(self.min_size, 1) and jnp.issubdtype(x.dtype, jnp.floating)
        )
        asked = getattr(R, "coded", None)
        chosen = large if asked is None else lambda path, _: path in asked
        coded = self.encode(self.rule.init(jnp.zeros(R.shape, R.dtype)), chosen, None)
        return coded._replace(count=jnp.zeros([], jnp.int32) if self.stochastic else None)

    def turn(self, state, turn):
        return self.again(self.rule.turn(self.decode(state, turn.Q.dtype), turn), state)

    def step(self, R, columns, state, **extra):
        A, c, new = self.rule.step(R, columns, self.decode(state, R.dtype), **extra)
        return A, c, self.again(new, state)

    def recall(self, state):
        return self.rule.recall(self.decode(state, jnp.float32))

    def encode(self, state, chosen, count):
        scales = {}

        def leaf(key_path, x):
            path = leaf_path(key_path)
            if not chosen(path, x):
                return x
            noise = None
            if count is not None:
                key = jax.random.fold_in(jax.random.key(self.seed), count)
                key = jax.random.fold_in(key, zlib.crc32(path.encode()))
                noise = jax.random.uniform(key, x.shape, jnp.float32)
            numbers, scales[path] = self.book.encode(x, self.signed(key_path), noise)
            return numbers

        inner = jax.tree_util.tree_map_with_path(leaf, state)
        return CodedState(inner, scales, None if count is None else optax.safe_increment(count))

    def again(self, new, state):
        return self.encode(new, lambda path, _: path in state.block_scale, state.count)

    def decode(self, state, dtype):
        def leaf(key_path, x):
            scale = state.block_scale.get(leaf_path(key_path))
            signed = self.signed(key_path)
            return x if scale is None else self.book.decode(x, scale, signed).astype(dtype)

        return jax.tree_util.tree_map_with_path(leaf, state.inner)

    def signed(self, key_path):
        return not {getattr(part, "name", None) for part in key_path} & self.unsigned
