"""Fits: how a basis is chosen from a gradient. `fit(key, G, P) -> P`, one matrix at a time.

A fit is a pure function of a key, a gradient `G` (m, n) and the old basis `P` (m, r), both float32 or wider;
it returns the new basis (m, r) with orthonormal columns, or zero columns where `G` has no direction left.
`low_rank` calls it only with finite, nonzero gradients, scaled to a largest entry of 1. A fit that sets `by_products`
takes a `linalg.LinearOperator` as well: of a gradient that is spread over devices its products travel, not its entries.
One that sets `in_range` makes P = G X for some X, so that columns of zeros in G change nothing but round-off, and rows
of zeros stay zero: matrices of several n then share a program.

The fits below are values: equal arguments give equal objects with equal hashes, so that a jitted function which takes
one as a static argument is compiled once, not once for every optimizer that is made.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_lowrank import checks, linalg
from optax_lowrank.walls import cond, vary_alike

Fit = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def svd() -> Fit:
    """Exact basis: the leading left singular vectors of the gradient.

    P = U[:, :r] with G = U Σ Vᵀ. The reference mode: what the papers do, and for the shapes of transformers tens of
    times slower than `randomized_svd` (`python -m benchmarks fits`). It gathers a sharded gradient on every device.

    Returns:
      A fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_lowrank as ol
      >>> G = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
      >>> ol.svd()(jax.random.key(0), G, jnp.zeros((3, 2))).tolist()
      [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]

    Reference: Zhao et al., arXiv:2403.03507, Algorithm 2. The sign of each column is fixed (the entry of
      largest magnitude is positive); the authors' code keeps whatever sign LAPACK returns.
    """
    return _Svd()


@dataclasses.dataclass(frozen=True)
class _Svd:
    def __call__(self, key, G, P):
        del key
        U, _, _ = jnp.linalg.svd(G, full_matrices=False)
        return linalg.fix_signs(U[:, : P.shape[1]])


def randomized_svd(oversample: int = 8, power_iterations: int = 1) -> Fit:
    """Randomized range finder with subspace iteration: matrix products and (r + p) × (r + p) factorizations.

    Y = GΩ with Gaussian Ω (n, r + p), then `power_iterations` times Y ← G orth(GᵀY), and the r leading left singular
    vectors of Y. On a spectrum σ_k ∝ k^-0.7 one iteration keeps about 0.99 of the best possible energy.

    Args:
      oversample: p ≥ 0, extra sketch columns; clipped so that r + p ≤ min(m, n). A sketch as wide as G is G.
      power_iterations: ≥ 0; each costs two products with the gradient.

    Returns:
      A fit, deterministic for a key.

    Raises:
      ValueError: an argument is negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_lowrank as ol
      >>> G = jax.random.normal(jax.random.key(1), (64, 4)) @ jax.random.normal(jax.random.key(2), (4, 96))
      >>> P = ol.randomized_svd()(jax.random.key(0), G, jnp.zeros((64, 4)))
      >>> bool(jnp.linalg.norm(G - P @ (P.T @ G)) < 1e-4 * jnp.linalg.norm(G))
      True

    Reference: Halko, Martinsson, Tropp, arXiv:0909.4061, Algorithms 4.4 and 5.1.
    """
    if oversample < 0 or power_iterations < 0:
        raise ValueError(
            f"`randomized_svd` needs oversample >= 0 and power_iterations >= 0, got {oversample=} and "
            f"{power_iterations=}."
        )

    return _RandomizedSvd(oversample, power_iterations)


@dataclasses.dataclass(frozen=True)
class _RandomizedSvd:
    oversample: int
    power_iterations: int
    by_products = in_range = True

    def __call__(self, key, G, P):
        G, rank = linalg.as_operator(G), P.shape[1]
        m, n = G.shape
        sketch = min(rank + self.oversample, m)
        if sketch >= n:
            # of the width of other sketches, whose programs for GPUs it then shares
            Y = jnp.pad(G.dense(), ((0, 0), (0, sketch - n)))
            return linalg.left_singular_vectors(Y)[:, :rank]

        def iterate(i, state):
            _, Q = state
            draw = lambda: jax.random.normal(key, (n, sketch), G.dtype)
            power = lambda: linalg.orthonormalize(G.T @ Q, of_longest=True)
            Y = G @ cond(i > 0, power, draw)
            return Y, linalg.orthonormalize(Y, of_longest=True)

        # a loop, so that each product and each factorization is compiled once however often it runs
        start, _ = vary_alike((jnp.zeros((m, sketch), G.dtype),) * 2, P)
        Y, Q = jax.lax.fori_loop(0, self.power_iterations + 1, iterate, start)
        return linalg.rotate_to_singular_vectors(Q, Y)[:, :rank]


def subspace_iteration() -> Fit:
    """Warm start: one step of subspace iteration from the old basis, cheap enough for every few steps.

    P ← left singular vectors of G orth(GᵀP). Columns of P that are zero (all of them at the first fit), or that add no
    direction to GᵀP (the gradient has become orthogonal to them), are seeded at random, so that a basis which has lost
    the gradient finds it again within the same call.

    Returns:
      A fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_lowrank as ol
      >>> G, P = jnp.diag(jnp.array([4.0, 2.0, 1.0])), jnp.zeros((3, 1))
      >>> for step in range(8): P = ol.subspace_iteration()(jax.random.key(step), G, P)
      >>> jnp.allclose(P[:, 0], jnp.array([1.0, 0.0, 0.0]), atol=1e-3).item()
      True

    Reference: Robert et al. (LDAdam), arXiv:2410.16103, which tracks its subspace by one step per update.
    """
    return _SubspaceIteration()


@dataclasses.dataclass(frozen=True)
class _SubspaceIteration:
    by_products = in_range = True

    def __call__(self, key, G, P):
        G = linalg.as_operator(G)

        def project(state):
            P, _, tries = state
            seeds = jax.random.normal(jax.random.fold_in(key, tries), P.shape, P.dtype)
            P = jnp.where(_there(P)[None, :], P, seeds / P.shape[0] ** 0.5)
            Z = linalg.orthonormalize(G.T @ P, of_longest=True)
            return jnp.where(_there(Z)[None, :], P, 0), Z, tries + 1

        def again(state):
            _, Z, tries = state
            return (tries == 0) | (tries == 1) & ~jnp.all(_there(Z))

        Z = jnp.zeros((G.shape[1], P.shape[1]), G.dtype)
        _, Z, _ = jax.lax.while_loop(again, project, vary_alike(P, Z, jnp.int32(0)))
        return linalg.left_singular_vectors(G @ Z)


def _there(P):
    return jnp.any(P != 0, axis=0)


def gaussian() -> Fit:
    """Random basis, independent of the gradient: P = orth(Ω) with Gaussian Ω (m, r).

    Returns:
      A fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_lowrank as ol
      >>> P = ol.gaussian()(jax.random.key(0), jnp.ones((16, 20)), jnp.zeros((16, 4)))
      >>> jnp.allclose(P.T @ P, jnp.eye(4), atol=1e-5).item()
      True

    Reference: Hao et al. (Flora), arXiv:2402.03293; ours is orthonormalized, so that P is a projector's basis.
    """
    return _Gaussian()


@dataclasses.dataclass(frozen=True)
class _Gaussian:
    by_products = True

    def __call__(self, key, G, P):
        return linalg.fix_signs(linalg.orthonormalize(jax.random.normal(key, P.shape, G.dtype)))


def adaptive_rank(
    fit: Fit, max_residual_energy: float = 0.3, min_rank: int = 8, rank_step: int = 8
) -> Fit:
    """Keeps as many columns of a fit as its gradient needs, and sets the others to zero.

    lost(r) = 1 − Σ_{k≤r} ‖P_kᵀG‖² / ‖G‖², which for singular vectors is 1 − Σ_{k≤r} σ_k² / ‖G‖². The active rank is the
    first r of min_rank, min_rank + rank_step, … with lost(r) ≤ max_residual_energy, else the rank of the basis. One fit
    answers for all r; zero columns make zero coordinates, moments and steps. `compact` releases their memory. Equal
    numbers give equal fits; arrays (injected hyperparameters) have no hash, and such a fit equals only itself.

    Args:
      fit: any fit whose columns come strongest first.
      max_residual_energy: share of ‖G‖² that may be lost, in [0, 1].
      min_rank: smallest active rank; above the rank of the basis it means that rank.
      rank_step: distance of the ranks that are tried. Both are rounded, as schedules have floats.

    Returns:
      A fit.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> fit = ol.adaptive_rank(ol.svd(), max_residual_energy=0.1, min_rank=1, rank_step=1)
      >>> P = fit(jax.random.key(0), jnp.diag(jnp.array([4.0, 3.0, 1.0])), jnp.zeros((3, 3)))
      >>> jnp.sum(jnp.any(P != 0, axis=0)).item()  # 1 of 26 is lost at rank 2, 10 of 26 at rank 1
      2

    Reference: Refael et al. (AdaRankGrad), arXiv:2410.17881, which searches by bisection with a new sketch for each
      probe and prints the supremum of the admissible ranks where the minimum is meant.
    """
    checks.number("max_residual_energy", max_residual_energy, 0, 1)
    checks.number("min_rank", min_rank, 1)
    checks.number("rank_step", rank_step, 1)
    check_fit(fit)
    adapted = _AdaptiveRank(fit, max_residual_energy, min_rank, rank_step)
    try:
        hash(adapted)
    except TypeError:  # an array has no hash; a bound method has that of its object's identity
        return adapted.__call__
    return adapted


@dataclasses.dataclass(frozen=True)
class _AdaptiveRank:
    fit: Fit
    max_residual_energy: float
    min_rank: int
    rank_step: int
    by_products = True

    def __call__(self, key, G, P):
        if not isinstance(G, linalg.LinearOperator):
            largest = jnp.max(jnp.abs(G))  # squares overflow long before G does
            G = G / jnp.where(largest > 0, largest, 1)
        G = linalg.as_operator(G)
        P = call_fit(self.fit, key, G, P)
        kept = jnp.cumsum(jnp.sum(jnp.square(G.T @ P), axis=0))
        lost = 1 - kept / G.energy()  # NaN for G = 0, whose basis is zero at every rank
        ranks = jnp.arange(1, P.shape[1] + 1)
        least, step = (jnp.maximum(jnp.round(x), 1) for x in (self.min_rank, self.rank_step))
        tried = (ranks >= least) & ((ranks - least) % step == 0)
        enough = tried & (lost <= self.max_residual_energy)
        rank = jnp.where(jnp.any(enough), ranks[jnp.argmax(enough)], P.shape[1])
        return jnp.where(ranks <= rank, P, 0)


def call_fit(fit: Fit, key: jax.Array, G: jax.Array | linalg.LinearOperator, P: jax.Array):
    """`fit(key, G, P)`, with all of G in one place if the fit needs it."""
    if isinstance(G, linalg.LinearOperator) and not getattr(fit, "by_products", False):
        G = G.dense()
    return fit(key, G, P)


def check_fit(fit):
    """`fit` as it is, a fit or a basis that is made from less than itself.

    Raises:
      TypeError: it is neither, or a function that makes one and was not called.
    """
    if inspect.isfunction(fit) and fit.__module__.startswith("optax_lowrank."):
        raise TypeError(f"`fit` must be called: `fit={fit.__name__}()`.")
    is_fit = callable(fit) and not isinstance(fit, type) and checks.takes(fit, 3)
    if not (is_fit or hasattr(fit, "implicit")):
        got = checks.shown(fit)
        raise TypeError(f"`fit` must be a fit such as `svd()`, got {got}: no `(key, G, P) -> P`.")
    return fit
