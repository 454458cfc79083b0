"""How a basis is stored between refits: in a dtype, or in codes of 8 or 4 bits that are corrected where it is used."""

import dataclasses
import functools
import itertools
import statistics
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from optax_lowrank import codes
from optax_lowrank.linalg import matmul


class BasisStore(Protocol):
    """A hashable pair of functions between a basis (..., m, r) and what the state holds of it.

    Every array that the state holds has r for its last axis, so that `resize` can cut columns; in the last of them a
    column of zeros is one that the basis does not use.
    """

    def encode(self, P: jax.Array) -> Any:
        """What is stored of P; all zeros, or a refit's result."""

    def decode(self, stored: Any, m: int, dtype: Any) -> jax.Array:
        """The basis, orthonormal to the precision of the store; columns that are not used are exactly zero."""


@dataclasses.dataclass(frozen=True)
class InDtype:
    """Bases as they are, in some dtype; None is that of the coordinates.

    Example:
      >>> import optax, optax_lowrank as ol, jax.numpy as jnp
      >>> tx = ol.low_rank(optax.scale_by_adam(), rank=2, basis_store=ol.InDtype(jnp.bfloat16))
    """

    dtype: Any = None

    def encode(self, P: jax.Array) -> jax.Array:
        """P in this dtype."""
        return P.astype(self.dtype or P.dtype)

    def decode(self, stored: jax.Array, m: int, dtype: Any) -> jax.Array:
        """The basis in `dtype`, as orthonormal as the stored one."""
        del m
        return stored.astype(dtype)


class CodedBasis(NamedTuple):
    """A basis in 8-bit codes; blocks run down the columns."""

    codes: jax.Array  # (..., m, r) uint8, see `codes.encode`
    block_scale: jax.Array  # (..., blocks, r) float32


class PairedBasis(NamedTuple):
    """A basis in 4-bit codes, two of a column to a byte, the upper row in the lower half."""

    pairs: jax.Array  # (..., ⌈m / 2⌉, r) uint8
    block_scale: jax.Array  # (..., blocks, r) float32


@dataclasses.dataclass(frozen=True)
class InCodes:
    """Bases in 8 or 4 bits a number, brought back to orthonormal columns on each use by r × r products.

    With D the decoded basis, its columns normalised, P = D (DᵀD)^(−1/2), the nearest orthonormal one, by Newton's
    iteration. Nothing is stored of it: the r × r correction in float32 would be as large as 8-bit codes of m = 4 r. It
    costs 2 m r² multiplications and a few r³ a step, where the projection has 2 m n r. It needs no factorization, which
    an accelerator does slowly, and of a sharded basis only an all-reduce of r × r. PᵀP = I holds to 1e-5.

    Args:
      bits: 8, the signed book of `quantize_state`, blocks of 256 rows; or 4, quantiles of a normal distribution, blocks
        of 128 rows.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> P = jnp.linalg.qr(jnp.sin(jnp.arange(320.0)).reshape(64, 5))[0]
      >>> store = ol.InCodes(4)
      >>> stored = store.encode(P)
      >>> Q = store.decode(stored, 64, P.dtype)
      >>> stored.pairs.shape, jnp.allclose(Q.T @ Q, jnp.eye(5), atol=1e-5).item()
      ((32, 5), True)

    Reference: Dettmers et al., arXiv:2305.14314 (the quantiles); Higham, Functions of Matrices, chapter 8 (the
      iteration).
    """

    bits: Literal[8, 4]

    def __post_init__(self):
        if not isinstance(self.bits, int) or self.bits not in (8, 4):
            raise ValueError(
                f"a basis has codes of 8 or 4 bits, got {self.bits!r}. Under `optax.inject_hyperparams` add "
                '"basis_bits" to `static_args`.'
            )

    def encode(self, P: jax.Array) -> CodedBasis | PairedBasis:
        """Codes and scales of P."""
        if self.bits == 8:
            numbers, scale = codes.encode(P.mT)
            return CodedBasis(numbers.mT, scale.mT)
        unit, scale = codes.in_blocks(P.mT, _ROWS)
        pairs = _in_pairs(_nearest_quantile(unit).mT)
        return PairedBasis(pairs, scale.mT)

    def decode(self, stored: CodedBasis | PairedBasis, m: int, dtype: Any) -> jax.Array:
        """The orthonormal basis (..., m, r) nearest to the decoded one."""
        if self.bits == 8:
            numbers, scale = stored
            D = codes.decode(numbers.mT, scale.mT).mT
        else:
            pairs, scale = stored
            unit = _quantile(_from_pairs(pairs, m))
            D = unit * codes.spread(scale.mT, unit.mT.shape, _ROWS).mT
        return _nearest_orthonormal(D.astype(dtype), steps=2 if self.bits == 8 else 4)


_ROWS = 128  # that share a scale in 4 bits


@functools.cache
def _quantiles() -> tuple[float, ...]:
    """The 16 values of a 4-bit code: equally spaced quantiles of a normal distribution, 0 among them, in [−1, 1]."""
    normal = statistics.NormalDist()
    tail = 0.9677083  # of the outermost quantile, theirs: the mean of 1 − 1/32 and 1 − 1/30
    half = lambda n: [normal.inv_cdf(tail + (0.5 - tail) * i / n) for i in range(n)]
    positive, negative = half(8), half(7)
    return tuple(x / positive[0] for x in sorted([*positive, 0.0, *(-x for x in negative)]))


def _nearest_quantile(unit):
    book = _quantiles()
    edges = [(a + b) / 2 for a, b in itertools.pairwise(book)]
    return sum((unit > edge).astype(jnp.uint8) for edge in edges)


def _quantile(index):
    value = jnp.zeros(index.shape, jnp.float32)
    for i, x in enumerate(_quantiles()):
        value = jnp.where(index == i, np.float32(x), value)
    return value


def _in_pairs(index):
    """(..., m, r) indices below 16, two rows to a byte."""
    padded = jnp.pad(index, [(0, 0)] * (index.ndim - 2) + [(0, index.shape[-2] % 2), (0, 0)])
    return padded[..., 0::2, :] | (padded[..., 1::2, :] << 4)


def _from_pairs(pairs, m):
    both = jnp.stack([pairs & 15, pairs >> 4], axis=-2)
    return both.reshape(*pairs.shape[:-2], -1, pairs.shape[-1])[..., :m, :]


def _nearest_orthonormal(D, steps):
    """D (DᵀD)^(−1/2) for columns that are orthonormal to some 10 %; columns of zeros stay."""
    length = jnp.linalg.norm(D, axis=-2, keepdims=True)
    D = D / jnp.where(length > 0, length, 1)  # zeros: a column that is not used
    gram = matmul(D.mT, D)
    identity = jnp.broadcast_to(jnp.eye(D.shape[-1], dtype=D.dtype), gram.shape)
    X = 1.5 * identity - 0.5 * gram
    for _ in range(steps - 1):
        X = matmul(X, 1.5 * identity - 0.5 * matmul(gram, matmul(X, X)))
    return matmul(D, X)


def basis_store(
    state_bits: Literal[8] | None, basis_bits: Literal[8, 4] | None = None
) -> BasisStore:
    """The store that goes with the options of an alias: bfloat16 with 8-bit moments, codes on request."""
    if basis_bits is not None:
        return InCodes(basis_bits)
    return InDtype(None if state_bits is None else jnp.bfloat16)
