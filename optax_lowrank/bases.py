"""How a basis is kept between refits: in a dtype, in codes of 8 or 4 bits, or not at all."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from optax_lowrank import linalg
from optax_lowrank.codes import Book
from optax_lowrank.fits import Fit, call_fit
from optax_lowrank.linalg import LinearOperator, as_operator, exact


class Basis(Protocol):
    """What `low_rank` asks of the bases of one run; a hashable value. One matrix at a time, P (m, r)."""

    implicit: bool  # made from less than itself, so that `read` needs a refit to speak of
    in_range: bool  # made of a gradient's columns, see `fits`

    def init(self, m: int, r: int, dtype: Any) -> Any:
        """What is stored before the first fit: a tree of arrays whose last axis is r, or nothing."""

    def refit(
        self, key: jax.Array, G: jax.Array | LinearOperator, P: jax.Array
    ) -> tuple[Any, jax.Array]:
        """What is stored of the basis for G (m, n), P being the old one, and whether that is any good, () bool."""

    def read(self, stored: Any, key: jax.Array, m: int, r: int, dtype: Any) -> jax.Array:
        """The basis, orthonormal to the precision of what is stored; `key` is that of the refit."""


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
class Fitted:
    """Bases that a fit chooses and a store keeps."""

    fit: Fit
    store: BasisStore
    implicit = False

    @property
    def in_range(self):
        """The fit's."""
        return getattr(self.fit, "in_range", False)

    def init(self, m, r, dtype):
        """Zeros."""
        return self.store.encode(jnp.zeros((m, r), dtype))

    def refit(self, key, G, P):
        """The fit's basis, unless it is not finite, not orthonormal or empty."""
        new = call_fit(self.fit, key, G, P)
        return self.store.encode(new), linalg.is_orthonormal(new) & jnp.any(new != 0)

    def read(self, stored, key, m, r, dtype):
        """What the store has."""
        del key, r
        return self.store.decode(stored, m, dtype)


@dataclasses.dataclass(frozen=True)
class _Seeded:
    implicit, in_range = True, False

    def init(self, m, r, dtype):
        del m, r, dtype
        return ()

    def refit(self, key, G, P):
        del key, G, P
        return (), jnp.bool_(True)

    def read(self, stored, key, m, r, dtype):
        del stored
        bits = jax.random.bits(key, (m,))
        signs = jnp.where(bits & 1, 1, -1).astype(dtype)
        return signs[:, None] * linalg.dct_columns(m, _drawn(bits >> 1, r), dtype)


def _drawn(number, r):
    """The places in order of the first r of m random numbers, (m,): the first r entries of a random permutation.

    To sort them instead is slow to compile for GPUs and TPUs.
    """
    i = jnp.arange(len(number))
    tie = (number[None] == number[:r, None]) & (i[None] < i[:r, None])
    smaller = (number[None] < number[:r, None]) | tie
    return jnp.sum(smaller, axis=1, dtype=jnp.int32)


def seeded() -> Basis:
    """Random bases of which nothing is stored: made anew from seed and count wherever they are used.

    P = S C[:, J], with C the m × m DCT, r of its columns J drawn at random and random signs S of the rows:
    orthonormal to rounding without a factorization, m · r cosines a use. For the argument `fit`.

    Returns:
      A fit that is its own store. `resize` cannot change its rank, which no array tells.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
      >>> ol.memory_report(ol.galore(0.01, rank=32, fit=ol.seeded()), shapes).arrays == 4 * 2 * 32 * 512
      True

    Reference: Hao et al. (Flora), arXiv:2402.03293, and Zhu et al. (APOLLO), arXiv:2412.05270, whose Gaussian
      matrices are not orthonormal; Woolfe et al., Appl. Comput. Harmon. Anal. 25 (2008), for the subsampled transform.
    """
    return _Seeded()


@dataclasses.dataclass(frozen=True)
class _DCT:
    implicit, in_range = True, False

    def init(self, m, r, dtype):
        del m, dtype
        return jnp.full((1, r), -1, jnp.int32)  # no column

    def refit(self, key, G, P):
        del key
        m, r = P.shape
        C = linalg.dct_columns(m, jnp.arange(m, dtype=jnp.int32), G.dtype)
        energy = jnp.sum(jnp.square(as_operator(G).T @ C), axis=0)
        return jax.lax.top_k(energy, r)[1].astype(jnp.int32)[None], jnp.all(jnp.isfinite(energy))

    def read(self, stored, key, m, r, dtype):
        del key, r
        J = stored[0]
        return jnp.where(J >= 0, linalg.dct_columns(m, jnp.maximum(J, 0), dtype), 0)


def dct() -> Basis:
    """Bases of which r integers are stored: the columns of the m × m DCT that hold most of the gradient.

    P = C[:, J] with J the r largest of the row norms of CᵀG, which is as large as G. Made anew from J wherever they are
    used, m · r cosines a use. For the argument `fit`.

    Returns:
      A fit that is its own store.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> G = jnp.ones((8, 12))  # all in the first column of the DCT
      >>> tx = ol.low_rank(optax.identity(), rank=1, fit=ol.dct())
      >>> update, state = tx.update({"kernel": G}, tx.init({"kernel": G}))
      >>> bool(jnp.allclose(update["kernel"], G, atol=1e-5)), state.leaves["kernel"].basis.tolist()
      (True, [[[0]]])

    Reference: Modoranu et al., arXiv:2505.17967.
    """
    return _DCT()


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
    """A basis in codes; blocks run down the columns, and so do the pairs of 4-bit codes that share a byte."""

    codes: jax.Array  # (..., m, r) or (..., m / 2, r), see `codes.Book`
    block_scale: jax.Array  # (..., blocks, r) float32


@dataclasses.dataclass(frozen=True)
class InCodes:
    """Bases in 8 or 4 bits a number, brought back to orthonormal columns on each use by r × r products.

    With D the decoded basis, its columns normalised, P = D (DᵀD)^(−1/2), the nearest orthonormal one, by the series of
    that root. Nothing is stored of it: the r × r correction in float32 would be as large as 8-bit codes of m = 4 r. It
    costs 2 m r² multiplications and a few r³ a step, twice that in 4 bits; the projection has 2 m n r. It needs no
    factorization, which an accelerator does slowly, and of a sharded basis only all-reduces of r × r. PᵀP = I holds to
    1e-5.

    Args:
      bits: 8, the signed book of `quantize_state`, blocks of 256 rows; or 4, quantiles of a normal distribution, blocks
        of 128 rows.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> P = jnp.linalg.qr(jnp.sin(jnp.arange(320.0)).reshape(64, 5))[0]
      >>> store = ol.InCodes(4)
      >>> stored = store.encode(P)
      >>> Q = store.decode(stored, 64, P.dtype)
      >>> stored.codes.shape, jnp.allclose(Q.T @ Q, jnp.eye(5), atol=1e-5).item()
      ((32, 5), True)

    Reference: Dettmers et al., arXiv:2305.14314 (the quantiles); Higham, Functions of Matrices, chapter 8 (the
      polar factor).
    """

    bits: Literal[8, 4]

    def __post_init__(self):
        if not isinstance(self.bits, int) or self.bits not in (8, 4):
            raise ValueError(f"a basis has codes of 8 or 4 bits, got `basis_bits={self.bits!r}`.")

    @property
    def _book(self) -> Book:
        return Book(self.bits, 256 if self.bits == 8 else 128)

    def encode(self, P: jax.Array) -> CodedBasis:
        """Codes and scales of P."""
        numbers, scale = self._book.encode(P.mT)
        return CodedBasis(numbers.mT, scale.mT)

    def decode(self, stored: CodedBasis, m: int, dtype: Any) -> jax.Array:
        """The orthonormal basis (..., m, r) nearest to the decoded one."""
        del m
        D = self._book.decode(stored.codes, stored.block_scale, axis=-2)
        return _nearest_orthonormal(D.astype(dtype), rounds=1 if self.bits == 8 else 2)


def _nearest_orthonormal(D, rounds):
    """D (DᵀD)^(−1/2) for columns that are orthonormal to some 10 %; columns of zeros stay."""
    length = jnp.linalg.norm(D, axis=-2, keepdims=True)
    D = D / jnp.where(length > 0, length, 1)  # zeros: a column that is not used
    r = D.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(r, dtype=D.dtype), (*D.shape[:-2], r, r))
    # of what is small a few digits do, which is a program of half the size for a TPU
    small = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGH)
    for _ in range(rounds):
        # not `linalg.matmul`: in steps, the parts of all bases of a leaf would be there at once
        E = identity - exact(D.mT, D)
        # (I − E)^(−1/2) − I, what is left out is of third order
        D = D + small(D, E / 2 + 3 / 8 * small(E, E))
    return D
