"""One-matrix maths: orthonormal bases from matrix products and r × r factorizations.

Nothing here factorizes anything as tall as a gradient. A sharded m × n gradient therefore needs only
all-reduces of r × r Gram matrices, and an accelerator sees matrix products instead of Householder
reflections. All arithmetic is float32 or wider, and so are products (`matmul`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_lowrank.walls import cond, loop, vary_alike

exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # in one kernel


@jax.jit  # traced once for operands that are alike
def matmul(A: jax.Array, B: jax.Array) -> jax.Array:
    """A B in float32 or wider and to its last digits, in the form that compiles fast on each platform.

    `Precision.HIGHEST`. On TPU that is six products of bfloat16 parts in one kernel, which takes XLA seconds to
    compile; there it is the same six in a loop, on 128 rows at a time.

    Args:
      A: (..., m, k) float32 or float64.
      B: (..., k, n), the same.

    Returns:
      (..., m, n).

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> linalg.matmul(jnp.eye(2), jnp.array([[1.0], [2.0]])).tolist()
      [[1.0], [2.0]]
    """
    if A.dtype != jnp.float32:
        return exact(A, B)
    return lax.platform_dependent(A, B, tpu=_in_parts, default=exact)


# of a thin side; XLA for TPUs is the longer about a product the larger its operands are
_BLOCK = 128


def _in_parts(A, B):
    """A B, a block of the shorter side of it at a time, as six products of bfloat16 parts, the smallest first.

    Float32 has digits for these six. The shorter side is one of r, which no mesh divides.
    """
    if A.shape[-2] > B.shape[-1]:
        return _in_parts(B.mT, A.mT).mT
    i, j = jnp.array([(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)]).T
    rows, AT, BT = A.shape[-2], A.mT, B.mT  # both contracted along rows, as XLA compiles it fastest
    block = min(rows, _BLOCK)

    def add(turn, C):
        k, start = turn % len(i), jnp.minimum(turn // len(i) * block, rows - block)
        some = lambda X, axis: lax.dynamic_slice_in_dim(X, start, block, axis)
        a, b = _part(some(AT, -1), i[k]).mT, _part(BT, j[k]).mT
        new = jnp.where(k > 0, some(C, -2), 0) + jnp.matmul(a, b, preferred_element_type=C.dtype)
        return lax.dynamic_update_slice_in_dim(C, new, start, axis=-2)

    C = jax.eval_shape(jnp.matmul, A, B)
    return loop(len(i) * -(-rows // block), add, jnp.zeros(C.shape, C.dtype))


def _part(X, i):
    """One of three bfloat16 arrays whose sum is X to the last digit."""
    first = _rounded(X)
    second = _rounded(X - first)
    parts = first, second, X - first - second
    return lax.select_n(i, *parts).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="axis")
def times(G: jax.Array, X: jax.Array, axis: int) -> jax.Array:
    """G X, or GᵀX, to the last digits of X, without parts of G, as `matmul` makes them on TPU.

    There, the three bfloat16 parts of X meet a bfloat16 G, some columns at a time: exact products, in a kernel that XLA
    compiles faster than the one of `Precision.HIGHEST`.

    Args:
      G: (m, n) bfloat16, or as X. A mesh may divide both axes.
      X: (n, k) or (m, k), float32 or float64.
      axis: of G, what is summed over: 1 makes G X, 0 makes GᵀX.

    Returns:
      (m, k) or (n, k), in the dtype of X.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> G = jnp.array([[1.0, 2.0]], jnp.bfloat16)
      >>> linalg.times(G, jnp.array([[1.0], [0.001]]), axis=1).tolist()
      [[1.0019999742507935]]
    """
    whole = lambda G, X: exact((G if axis else G.T).astype(X.dtype), X)
    if G.dtype != jnp.bfloat16 or X.dtype != jnp.float32:
        return whole(G, X)
    in_parts = functools.partial(_times_parts, axis=axis)
    return lax.platform_dependent(G, X, tpu=in_parts, default=whole)


def _times_parts(G, X, axis):
    m, k = G.shape[1 - axis], X.shape[1]
    # Filled up to whole tiles. A G of 5461 columns XLA would want laid out in another order here than where its largest
    # entry is looked for, and if it is of a stack, copy the stack.
    G = jnp.pad(G, [(0, -size % _BLOCK) for size in G.shape])
    X = jnp.pad(X, [(0, -len(X) % _BLOCK), (0, 0)])
    # one sum over parts as well: between devices that share a G, each number of the product travels once
    thrice, of = jnp.broadcast_to(G, (3, *G.shape)), "pmn,pnk->mk" if axis else "pnm,pnk->mk"
    block = min(k, _BLOCK)

    def put(turn, Y):
        start = jnp.minimum(turn * block, k - block)
        some = lax.dynamic_slice_in_dim(X, start, block, axis=1)
        parts = lax.optimization_barrier(jnp.stack([_part(some, jnp.int32(i)) for i in range(3)]))
        new = jnp.einsum(of, thrice, parts, preferred_element_type=Y.dtype)
        return lax.dynamic_update_slice_in_dim(Y, new, start, axis=1)

    return loop(-(-k // block), put, jnp.zeros((G.shape[1 - axis], k), X.dtype))[:m]


def _rounded(X):
    # a cast to bfloat16 and back XLA may leave out
    return lax.reduce_precision(X, exponent_bits=8, mantissa_bits=7)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearOperator:
    """A matrix G (m, n) known by its products, so that it need not be in one place: `G @ X`, `G.T @ Y`.

    Args:
      shape, dtype: of the matrix; float32 or wider.
      times: X (n, k) ↦ G X.
      transposed_times: Y (m, k) ↦ GᵀY.
      energy: () ↦ ‖G‖².
      dense: () ↦ the matrix itself.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> G = linalg.as_operator(jnp.array([[3.0, 0.0], [0.0, 4.0]]))
      >>> (G @ jnp.ones((2, 1))).tolist(), G.energy().item()
      ([[3.0], [4.0]], 25.0)
    """

    shape: tuple[int, int]
    dtype: Any
    times: Callable[[jax.Array], jax.Array]
    transposed_times: Callable[[jax.Array], jax.Array]
    energy: Callable[[], jax.Array]
    dense: Callable[[], jax.Array]

    def __matmul__(self, X: jax.Array) -> jax.Array:
        return self.times(X)

    @property
    def T(self) -> "LinearOperator":
        """The transposed matrix."""
        return dataclasses.replace(
            self,
            shape=self.shape[::-1],
            times=self.transposed_times,
            transposed_times=self.times,
            dense=lambda: self.dense().T,
        )

    def plus(self, P: jax.Array, C: jax.Array) -> "LinearOperator":
        """G + P C, P (m, r) with orthonormal columns."""
        return dataclasses.replace(
            self,
            times=lambda X: self @ X + matmul(P, matmul(C, X)),
            transposed_times=lambda Y: self.T @ Y + matmul(C.T, matmul(P.T, Y)),
            energy=lambda: self.energy() + jnp.sum(C * (2 * (self.T @ P).T + C)),
            dense=lambda: self.dense() + matmul(P, C),
        )


def as_operator(G: jax.Array | LinearOperator) -> LinearOperator:
    """A matrix as an operator, with products at `Precision.HIGHEST`."""
    if isinstance(G, LinearOperator):
        return G
    return LinearOperator(
        G.shape,
        G.dtype,
        functools.partial(matmul, G),
        functools.partial(matmul, G.T),
        lambda: jnp.sum(jnp.square(G)),
        lambda: G,
    )


def fix_signs(P: jax.Array) -> jax.Array:
    """Flips columns so that in each the entry of largest magnitude (the first of equals) is positive.

    Singular vectors are unique only up to sign; without a rule two backends take different steps from
    the first refresh on.

    Args:
      P: (m, r) matrix.

    Returns:
      (m, r) matrix with the same columns up to sign; zero columns stay zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> linalg.fix_signs(jnp.array([[0.1, 0.6], [-0.9, 0.8]])).tolist()
      [[-0.10000000149011612, 0.6000000238418579], [0.8999999761581421, 0.800000011920929]]
    """
    top = jnp.take_along_axis(P, jnp.argmax(jnp.abs(P), axis=0, keepdims=True), axis=0)
    return jnp.where(top < 0, -P, P)


def is_orthonormal(P: jax.Array, tol: float = 1e-3) -> jax.Array:
    """Whether `P` is a basis: finite, its columns orthonormal to `tol` or exactly zero.

    |PᵀP − D| ≤ tol in every entry, D diagonal, 0 for the columns that are exactly zero and 1 for the others.

    Args:
      P: (m, r) matrix.
      tol: largest deviation of an entry of PᵀP.

    Returns:
      () bool.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> P = jnp.array([[1.0, 0.0], [0.0, 0.0]])
      >>> [linalg.is_orthonormal(x).item() for x in (P, P + 0.1, P * jnp.nan)]
      [True, False, False]
    """
    D = jnp.diag(jnp.any(P != 0, axis=0).astype(P.dtype))
    return jnp.all(jnp.abs(matmul(P.T, P) - D) <= tol)  # a comparison with NaN is false


def orthonormalize(Y: jax.Array, *, of_longest: bool = False) -> jax.Array:
    """Orthonormal basis of the columns of `Y`; exactly zero columns where `Y` has lost rank. For every finite `Y`.

    CholeskyQR, repeated until it has converged: YᵀY = L Lᵀ, Y ← Y L⁻ᵀ. Where that Gram matrix is too ill-conditioned
    to factorize, a pivoted elimination chooses columns that are far from dependent; these are orthonormalized, the
    others lose their part along them and try again.

    A column is lost when what the columns before it leave of it is round-off: shorter than 16 eps √r of its own length.
    So its scale alone never loses it, be the lengths 1e-30 and 1e30 side by side; only a column without an entry above
    the smallest normal number counts as zero.

    Args:
      Y: (m, r) matrix, m ≥ r, float32 or float64.
      of_longest: measure by the longest column instead, and lose what is below 64 eps √r of it: of a product with a
        gradient, that is round-off.

    Returns:
      (m, r) matrix Q. QᵀQ is the identity, but for zeros in place of directions that `Y` does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> Q = linalg.orthonormalize(jnp.array([[3.0, 1.0], [4.0, 2.0], [0.0, 2.0]]))
      >>> jnp.allclose(Q.T @ Q, jnp.eye(2), atol=1e-6).item()
      True
      >>> linalg.orthonormalize(jnp.ones((4, 2))).tolist()
      [[0.5, 0.0], [0.5, 0.0], [0.5, 0.0], [0.5, 0.0]]

    Reference: Fukaya et al., arXiv:1809.11085. Instead of its shift, for which no size is right for all `Y`, we choose
      columns, and instead of a triangular solve we multiply with the inverse, which a sharded `Y` needs no
      communication for.
    """
    Y, length = _unit_columns(Y)
    # with a quarter of their lengths, columns are lost below 4 · 16 eps √r
    return _orthonormalize(Y, length / 4 if of_longest else jnp.ones_like(length))


def _unit_columns(Y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Y` with columns of length 1 or 0, and their lengths as a share of the longest."""
    top = jnp.max(jnp.abs(Y), axis=0)
    there = top >= jnp.finfo(Y.dtype).tiny  # what is smaller may be flushed to zero: 0 / 0
    Y = jnp.where(there, Y / jnp.where(there, top, 1)[None, :], 0)
    length = jnp.sqrt(jnp.sum(jnp.square(Y), axis=0))
    Y = Y / jnp.where(there, length, 1)[None, :]
    share = length * (top / jnp.where(jnp.any(there), jnp.max(top), 1))
    return Y, share / jnp.maximum(jnp.max(share), 1)


class _Sweep(NamedTuple):
    Y: jax.Array  # (m, r), columns of length 1 at most
    left: jax.Array  # (r,), what is left of a column, in units of the length of its remainder in Y
    accepted: jax.Array  # (r,) bool, columns that are orthonormal, if not to the last digit
    chosen: jax.Array  # (r,) bool, columns to be orthonormal after the next sweep
    failures: jax.Array  # () int32, Gram matrices that could not be factorized
    sweeps: jax.Array  # () int32
    done: jax.Array  # () bool, all of Y is orthonormal to the last digit


_MOST_SWEEPS = 64  # 2 do for most matrices, about 10 where the spectrum falls off gradually


def _orthonormalize(Y: jax.Array, left: jax.Array) -> jax.Array:
    """`orthonormalize` of unit columns that stand for columns of length `left`, lost below 16 eps √r."""
    r, eps = Y.shape[1], jnp.finfo(Y.dtype).eps
    round_off = 16 * eps * r**0.5
    smallest = 128 * eps  # square of a pivot: an error of eps in the Gram matrix is 1 % of it
    identity = jnp.eye(r, dtype=Y.dtype)

    def sweep(state):
        C = matmul(state.Y.T, state.Y)
        length = jnp.sqrt(jnp.diagonal(C))
        left = state.left * length
        lost = ~(left > round_off)
        normalize = jnp.where(lost, 0, 1 / jnp.where(lost, 1, length))
        C = normalize[:, None] * C * normalize[None, :] + jnp.diag(lost.astype(C.dtype))
        # a remainder near round-off still overlaps the accepted columns, and must not take their place
        overlap = jnp.sum(jnp.where(state.accepted[:, None], jnp.square(C), 0), axis=0)
        free = state.accepted | lost | (overlap < eps)
        chosen = state.chosen & free | lost
        W = _whitener(jnp.where(_outer(chosen), C, identity))
        pivots = 1 / jnp.diagonal(W)
        factorized = jnp.all(jnp.square(pivots) > smallest)  # false where they are NaN
        # lost before the others lose what they have along it
        lost = factorized & (left * pivots <= round_off) & ~lost

        def project():
            V = jnp.where(chosen[None, :], W, 0)
            return jnp.where(chosen[None, :], W, identity - matmul(V, matmul(V.T, C)))

        def apply():
            transform = lax.cond(jnp.all(chosen), lambda: W, project)
            return state._replace(
                Y=matmul(state.Y, normalize[:, None] * transform),
                left=left * pivots,  # the pivot is 1 where the column is not chosen
                accepted=chosen,
                chosen=jnp.ones_like(chosen),
                # condition below 3: the product is orthonormal to the last digit
                done=jnp.all(chosen) & (jnp.sum(jnp.square(C - identity)) < 0.25),
            )

        def choose():
            # stricter after each failure, and always met by a column that is left alone
            threshold = jnp.minimum(64 * smallest * 2.0 ** state.failures.astype(C.dtype), 0.25)
            return state._replace(
                left=jnp.where(lost, 0, state.left),
                chosen=_independent(jnp.where(_outer(free), C, 0), threshold),
                failures=state.failures + jnp.where(factorized, 0, 1),
            )

        state = state._replace(sweeps=state.sweeps + 1)
        return cond(factorized & ~jnp.any(lost), apply, choose)

    none, zero = jnp.zeros(r, bool), jnp.zeros((), jnp.int32)
    (start,) = vary_alike(_Sweep(Y, left, none, ~none, zero, zero, zero > 0))
    end = lax.while_loop(lambda state: ~state.done & (state.sweeps < _MOST_SWEEPS), sweep, start)
    return jnp.where(end.done, end.Y, 0)


def _outer(mask):
    return mask[:, None] & mask[None, :]


def _whitener(C: jax.Array) -> jax.Array:
    """Upper triangular W with WᵀCW = I, for positive definite C; NaN otherwise."""
    identity = jnp.eye(C.shape[0], dtype=C.dtype)
    L = lax.linalg.cholesky(C, symmetrize_input=False)
    return lax.linalg.triangular_solve(L, identity, left_side=True, lower=True).T


def _independent(C: jax.Array, threshold: jax.Array) -> jax.Array:
    """Columns that a Cholesky factorization of C, its pivots chosen by size, meets before one below `threshold`."""

    def pivots(state):
        S, chosen = state
        return jnp.where(chosen, 0, jnp.diagonal(S))

    def eliminate(state):
        (S, chosen), pivot = state, pivots(state)
        j = jnp.argmax(pivot)
        return S - S[:, j, None] * (S[None, j] / pivot[j]), chosen.at[j].set(True)

    start = vary_alike(C, jnp.zeros(C.shape[0], bool))
    return lax.while_loop(lambda state: jnp.any(pivots(state) > threshold), eliminate, start)[1]


def eigh(C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric `C`, in the form that compiles fast on each platform.

    On TPU Jacobi rotations: XLA's default there is a divide and conquer that takes minutes to compile at r = 512.

    Args:
      C: (r, r) symmetric, float32 or float64.

    Returns:
      (r,) eigenvalues and (r, r) eigenvectors in columns.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> linalg.eigh(jnp.diag(jnp.array([2.0, 1.0])))[0].tolist()
      [1.0, 2.0]
    """

    def jacobi(C):
        kind = lax.linalg.EighImplementation.JACOBI
        V, values = lax.linalg.eigh(C, implementation=kind, sort_eigenvalues=False)
        order = jnp.argsort(values)  # to sort the vectors with them takes seconds to compile
        return values[order], V[:, order]

    return lax.platform_dependent(C, tpu=jacobi, default=lambda C: tuple(jnp.linalg.eigh(C)))


def left_singular_vectors(Y: jax.Array) -> jax.Array:
    """Left singular vectors of a tall `Y`, strongest first, from an eigendecomposition of r × r.

    Q = orthonormal basis of Y, T = QᵀY, T Tᵀ = U Σ² Uᵀ, result Q U. Unlike in `orthonormalize`, what is shorter than
    64 eps √r of the *longest* column is lost: `Y` is a product with a gradient, whose round-off is of that size.

    Args:
      Y: (m, r) matrix, m ≥ r, float32 or float64.

    Returns:
      (m, r) orthonormal columns, zero columns last where `Y` has lost rank; signs fixed.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> linalg.left_singular_vectors(jnp.array([[0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    """
    return rotate_to_singular_vectors(orthonormalize(Y, of_longest=True), Y)


def rotate_to_singular_vectors(Q: jax.Array, Y: jax.Array) -> jax.Array:
    """The second half of `left_singular_vectors`: T = QᵀY, T Tᵀ = U Σ² Uᵀ, result Q U.

    Args:
      Q: (m, r) orthonormal basis of the columns of `Y`, zero columns where it has lost rank.
      Y: (m, r) matrix.

    Returns:
      (m, r) orthonormal columns, zero columns last; signs fixed.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> linalg.rotate_to_singular_vectors(jnp.eye(2), jnp.diag(jnp.array([1.0, 2.0]))).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    Y, length = _unit_columns(Y)
    T = matmul(Q.T, Y) * length[None, :]
    C = matmul(T, T.T)
    # lost directions go below every eigenvalue, so that no eigenvector mixes them with kept ones
    lost = ~jnp.any(Q != 0, axis=0)
    C = C - jnp.diag(jnp.where(lost, 1.0 + jnp.trace(C), 0.0))
    _, U = eigh(C)
    kept = jnp.arange(Y.shape[1]) < jnp.sum(~lost)
    return fix_signs(jnp.where(kept[None, :], matmul(Q, U[:, ::-1]), 0))


def push_through_weights(gram: jax.Array, e: jax.Array, damping: jax.Array) -> jax.Array:
    """Weights w = (λI + HᵀH)⁻¹ e of the columns of H in (λI + H Hᵀ)⁻¹ H e = H w, without forming H Hᵀ.

    The Woodbury form g/λ − H (λI + HᵀH)⁻¹ Hᵀg / λ subtracts two vectors of size ‖g‖/λ and loses every digit in
    float32; pushing H through the inverse subtracts nothing.

    Args:
      gram: (..., s, s), HᵀH in float32 or wider.
      e: (..., s), coefficients of the right-hand side H e.
      damping: (...), λ > 0.

    Returns:
      (..., s) weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> H = jnp.array([[3.0], [4.0]])
      >>> x = H @ linalg.push_through_weights(H.T @ H, jnp.ones(1), jnp.array(25.0))
      >>> jnp.allclose(x, jnp.array([3.0, 4.0]) / 50).item()
      True
    """
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    damped = gram + damping[..., None, None] * identity
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), e[..., None])[..., 0]


def dct_columns(m: int, index: jax.Array, dtype) -> jax.Array:
    """Columns of the orthonormal m × m DCT: C_ik = √(2/m) cos(π (2i + 1) k / 2m), and √(1/m) for k = 0.

    Args:
      m: size.
      index: (r,) int32, which columns.
      dtype: of the result.

    Returns:
      (m, r) orthonormal columns.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> C = linalg.dct_columns(8, jnp.arange(8), jnp.float32)
      >>> jnp.allclose(C.T @ C, jnp.eye(8), atol=1e-6).item()
      True
    """
    row, k, period = 2 * jnp.arange(m, dtype=jnp.int32)[:, None] + 1, index[None, :], 4 * m

    def reduced(turn):  # to about half a period; a remainder of integers is slow
        return turn - period * jnp.round(turn.astype(jnp.float32) / period).astype(jnp.int32)

    # (2i + 1) k in two steps, as the product may overflow
    turn = jnp.abs(reduced(256 * reduced(row * (k // 256)) + row * (k % 256)))
    length = jnp.where(k == 0, (1 / m) ** 0.5, (2 / m) ** 0.5).astype(dtype)
    return length * _cos_turns(turn, period, jnp.dtype(dtype))


def _cos_turns(turn, period, dtype):
    """cos(2π turn / period) for integers from 0 to about period / 2."""
    # `jnp.cos` takes any angle, and fused with what follows it takes XLA for TPUs a minute to compile
    beyond = turn > period // 4
    x = jnp.where(beyond, period // 2 - turn, turn).astype(dtype) * (2 * math.pi / period)
    cos = jnp.ones_like(x)  # its series to where the next term is below the last digit
    for n in range(12 if dtype == jnp.float64 else 7, 0, -1):
        cos = 1 - jnp.square(x) / ((2 * n - 1) * 2 * n) * cos
    return jnp.where(beyond, -cos, cos)


def newton_schulz(X: jax.Array, steps: int = 5) -> jax.Array:
    """An approximate polar factor U Vᵀ of X = U Σ Vᵀ, by matrix products on the shorter side.

    X ← X / ‖X‖, then `steps` times X ← a X + (b X Xᵀ + c (X Xᵀ)²) X with Muon's (a, b, c), steep at zero: five steps
    take singular values above 1e-3 ‖X‖ into about [0.7, 1.2], not to 1.

    Args:
      X: (m, n) matrix, any float dtype; products are in that dtype and precision, of float16 in float32.
      steps: iterations.

    Returns:
      (m, n) matrix; zeros where X is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> O = linalg.newton_schulz(jnp.diag(jnp.array([5.0, 1.0, -2.0])))
      >>> jnp.allclose(jnp.abs(jnp.diag(O)), 1, atol=0.35).item(), O[2, 2].item() < 0
      (True, True)

    Reference: Jordan et al., Muon, 2024, whose coefficients these are.
    """
    if X.dtype == jnp.float16:  # which has no numbers for most norms
        return newton_schulz(X.astype(jnp.float32), steps).astype(X.dtype)
    a, b, c = (jnp.asarray(x, X.dtype) for x in (3.4445, -4.7750, 2.0315))
    tall = X.shape[0] > X.shape[1]
    # or XLA keeps what X was before it was rounded, for the norm alone
    X = lax.optimization_barrier(X.T if tall else X)
    norm = jnp.sqrt(jnp.sum(jnp.square(X.astype(jnp.promote_types(X.dtype, jnp.float32)))))
    X = X / (norm + 1e-8).astype(X.dtype)

    def iterate(_, X):
        A = X @ X.T
        return a * X + (b * A + c * (A @ A)) @ X

    # unrolled, XLA for TPUs keeps the sums a X + ... of all iterations until the last
    X = lax.fori_loop(0, steps, iterate, X)
    return X.T if tall else X
