"""One-matrix maths: orthonormal bases from matrix products and r × r factorizations.

Nothing here factorizes anything as tall as a gradient. A sharded m × n gradient therefore needs only
all-reduces of r × r Gram matrices, and an accelerator sees matrix products instead of Householder
reflections. All arithmetic is float32 or wider, with products at `Precision.HIGHEST`.
"""

import functools

import jax
import jax.numpy as jnp

matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Squared length, after a first whitening, below which a direction counts as round-off. With the ridge of
# that whitening it keeps directions down to about 1e-6 of the norm of the matrix in float32.
_ROUND_OFF = 1e-5


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


def orthonormalize(Y: jax.Array) -> jax.Array:
    """Orthonormal basis of the columns of `Y` by CholeskyQR2; zero columns where `Y` has lost rank.

    C = YᵀY + ridge = L Lᵀ, Y ← Y L⁻ᵀ, twice. The relative ridge lets the first factorization pass for
    any `Y`; if the second Gram matrix is then far from the identity, `Y` is nearly rank deficient and
    an eigendecomposition of that r × r matrix separates directions from round-off.

    Args:
      Y: (m, r) matrix, m ≥ r, float32 or float64.

    Returns:
      (m, r) matrix Q. QᵀQ is the identity, but for zeros in place of directions that `Y` does not have
      (shorter than about 1e-6 of its norm).

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> Q = linalg.orthonormalize(jnp.array([[3.0, 1.0], [4.0, 2.0], [0.0, 2.0]]))
      >>> jnp.allclose(Q.T @ Q, jnp.eye(2), atol=1e-6).item()
      True

    Reference: Fukaya et al., arXiv:1809.11085 (shifted CholeskyQR); ours replaces the triangular solve
      by a product with the explicit inverse, which a sharded `Y` needs no communication for.
    """
    C = matmul(Y.T, Y)
    # twice the round-off of C, so that the factorization passes; any positive ridge does for Y = 0
    ridge = jnp.where(jnp.trace(C) > 0, 2.0 * jnp.finfo(C.dtype).eps * jnp.trace(C), 1.0)
    Y = matmul(Y, _whitener(C + ridge * jnp.eye(C.shape[0], dtype=C.dtype)))
    C = matmul(Y.T, Y)
    W = _whitener(C)
    # 1 / W_ii are the pivots of C: all near 1 where the first pass has succeeded, NaN on failure
    well_conditioned = jnp.all(jnp.diagonal(W) < 2.0)
    return jax.lax.cond(well_conditioned, matmul, lambda Y, W: _drop_round_off(Y, C), Y, W)


def _whitener(C: jax.Array) -> jax.Array:
    """Upper triangular W with WᵀCW = I, for positive definite C."""
    identity = jnp.eye(C.shape[0], dtype=C.dtype)
    L = jnp.linalg.cholesky(C)
    return jax.lax.linalg.triangular_solve(L, identity, left_side=True, lower=True).T


def _drop_round_off(Y: jax.Array, C: jax.Array) -> jax.Array:
    lengths, V = jnp.linalg.eigh(C)
    keep = lengths > _ROUND_OFF * lengths[-1]
    Y = matmul(Y, V * jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, lengths, 1.0)), 0.0)[None, :])
    # eigenvectors of a float32 Gram matrix are orthogonal only to 1e-7 / 1e-5: one more pass
    return matmul(
        Y, _whitener(matmul(Y.T, Y) + jnp.diag(jnp.where(keep, 0.0, 1.0).astype(C.dtype)))
    )


def left_singular_vectors(Y: jax.Array) -> jax.Array:
    """Left singular vectors of a tall `Y`, strongest first, from an eigendecomposition of r × r.

    Q = orthonormalize(Y), T = QᵀY, T Tᵀ = U Σ² Uᵀ, result Q U.

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
    Q = orthonormalize(Y)
    T = matmul(Q.T, Y)
    C = matmul(T, T.T)
    # lost directions go below every eigenvalue, so that no eigenvector mixes them with kept ones
    lost = jnp.sum(jnp.square(Q), axis=0) < 0.5
    C = C - jnp.diag(jnp.where(lost, 1.0 + jnp.trace(C), 0.0))
    _, U = jnp.linalg.eigh(C)
    return fix_signs(matmul(Q, U[:, ::-1]))


def subspace_step(G: jax.Array, P: jax.Array) -> jax.Array:
    """One step of subspace iteration, P ← left singular vectors of (G · orth(GᵀP)).

    Args:
      G: (m, n) matrix, float32 or float64.
      P: (m, r) start, r ≤ min(m, n); need not be orthonormal.

    Returns:
      (m, r) estimate of the leading left singular vectors of `G`, strongest first, signs fixed. Two
      products with `G`; the angle to the true subspace shrinks by (σ_{r+1} / σ_r)² a step.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_lowrank import linalg
      >>> G = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
      >>> P = jnp.ones((3, 1))
      >>> for _ in range(8): P = linalg.subspace_step(G, P)
      >>> jnp.allclose(P[:, 0], jnp.array([1.0, 0.0, 0.0]), atol=1e-3).item()
      True

    Reference: Halko, Martinsson, Tropp, arXiv:0909.4061, Algorithm 4.4; the last half step doubles as
      their projection B = QᵀG, which saves one product with `G`.
    """
    return left_singular_vectors(matmul(G, orthonormalize(matmul(G.T, P))))


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
