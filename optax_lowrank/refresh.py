"""When a basis is refit, and how: the policies, and one compiled fit per distinct folded shape.

A refresh policy answers "refit now?" from `(count, statistics of the previous step)`, with a bool scalar for the whole
tree or a dict by path of (b,) bools. The answer for a single matrix is only ever looked at as a scalar inside a loop: a
batched predicate would turn `lax.cond` into a select that factorizes every matrix on every step.
"""

import collections
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_lowrank.fits import Fit
from optax_lowrank.linalg import matmul
from optax_lowrank.views import MatrixView


class Statistics(NamedTuple):
    """What the core knows of each matrix: dicts by path of (b,) arrays."""

    last_fit: Any  # int32, the count at the last refit, -1 before the first; changes on refresh
    pending: Any  # bool, a refit is due and has not met a usable gradient yet
    skips: Any  # int32, steps whose gradient was not finite, or could not be used for a refit that was due
    captured: Any  # float32, ‖R‖² / ‖G‖² at the last refit; of every step, if the policy watches it
    fit_norm: Any  # float32, ‖R‖ at the last refit
    norm: Any  # float32, ‖R‖ averaged over the steps since then, decay 0.9


Policy = Callable[[jax.Array, Statistics], Any]


def every(n: int, stagger: bool = False) -> Policy:
    """Refresh policy: at updates 0, n, 2n, …

    Args:
      n: updates between refits of a matrix, ≥ 1; may be traced.
      stagger: give each matrix (each layer of a stack) a phase of its own, so that no step refits them all. The first
        fit is at update 0 all the same.

    Returns:
      A policy.

    Raises:
      ValueError: n < 1.

    Example:
      >>> import optax_lowrank as ol
      >>> [count for count in range(10) if ol.every(4)(count, None)]
      [0, 4, 8]
    """
    if isinstance(n, int) and n < 1:
        raise ValueError(f"a refresh interval is a positive number of updates, got {n}.")

    def due(count, stats):
        if not stagger:
            return count % n == 0
        sizes = {path: last_fit.size for path, last_fit in stats.last_fit.items()}
        total, start, answer = sum(sizes.values()), 0, {}
        for path, size in sizes.items():
            answer[path] = (count + jnp.arange(start, start + size) * n // total) % n == 0
            start += size
        return answer

    return due


def on_convergence(threshold: float = 0.1, min_gap: int = 20, max_gap: int = 200) -> Policy:
    """Refresh policy: when the projected gradient has shrunk, ‖R‖ ≤ threshold · ‖R at the last refit‖.

    ‖R‖ is averaged over steps (decay 0.9), since one mini-batch says little.

    Args:
      threshold: relative norm, in (0, 1).
      min_gap: at least so many updates between refits of a matrix.
      max_gap: refit after so many updates in any case.

    Returns:
      A policy that answers per matrix.

    Raises:
      ValueError: not 1 ≤ min_gap ≤ max_gap.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> tx = ol.low_rank(optax.scale_by_adam(), rank=4, refresh=ol.on_convergence(0.3, min_gap=50, max_gap=500))

    Reference: Refael et al. (AdaRankGrad), arXiv:2410.17881. Their criterion is an absolute norm, which mini-batch
      gradients never reach; ours is relative.
    """
    _check_gaps(min_gap, max_gap)

    def due(count, stats):
        def matrices(last_fit, norm, fit_norm):
            age = count - last_fit
            return (age >= max_gap) | ((age >= min_gap) & (norm <= threshold * fit_norm))

        return jax.tree.map(matrices, stats.last_fit, stats.norm, stats.fit_norm)

    return due


def on_staleness(min_captured: float = 0.5, min_gap: int = 20, max_gap: int = 200) -> Policy:
    """Refresh policy: when the basis holds too little of its gradient, ‖R‖² < min_captured · ‖G‖².

    Watching ‖G‖ costs one pass over each gradient on every step; the other policies do without.

    Args:
      min_captured: share of the squared norm, in (0, 1).
      min_gap: at least so many updates between refits of a matrix.
      max_gap: refit after so many updates in any case.

    Returns:
      A policy that answers per matrix.

    Raises:
      ValueError: not 1 ≤ min_gap ≤ max_gap.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> tx = ol.low_rank(optax.scale_by_adam(), rank=4, refresh=ol.on_staleness(0.6))
    """
    _check_gaps(min_gap, max_gap)

    def due(count, stats):
        def matrices(last_fit, captured):
            age = count - last_fit
            return (age >= max_gap) | ((age >= min_gap) & (captured < min_captured))

        return jax.tree.map(matrices, stats.last_fit, stats.captured)

    due.watches_captured = True  # asks `low_rank` to measure `captured` on every step
    return due


def _check_gaps(min_gap, max_gap):
    if isinstance(min_gap, int) and isinstance(max_gap, int) and not 1 <= min_gap <= max_gap:
        raise ValueError(f"a policy needs 1 <= min_gap <= max_gap, got {min_gap=} and {max_gap=}.")


class Refit(NamedTuple):
    """Outcome of the refresh of one step, dicts by path."""

    basis: dict[str, jax.Array]  # (b, m, r)
    rotation: dict[str, jax.Array]  # (b, r, r), P_newᵀ P_old; the identity where not fitted
    fitted: dict[str, jax.Array]  # (b,) bool
    energy: dict[str, jax.Array]  # (b,) float32, ‖G‖² where fitted


def initial_statistics(views: Mapping[str, MatrixView]) -> Statistics:
    """Statistics before the first step: every matrix waits for a basis."""
    full = lambda value: {path: jnp.full(view.batch, value) for path, view in views.items()}
    return Statistics(full(jnp.int32(-1)), full(True), full(jnp.int32(0)), *(full(jnp.float32(0)) for _ in range(3)))


def waiting(policy: Policy, count: jax.Array, stats: Statistics) -> dict[str, jax.Array]:
    """(b,) bools by path: matrices that the policy wants refit now, or wanted refit and met no usable gradient."""
    due = policy(count, stats)
    return {p: wait | (due[p] if isinstance(due, Mapping) else due) for p, wait in stats.pending.items()}


def refit(fit: Fit, key, leaves, views: Mapping[str, MatrixView], basis, pending) -> Refit:
    """Refits the matrices in `pending` whose gradient is finite and nonzero; the others keep their basis.

    Leaves of equal folded shape share one compiled fit, which a loop applies to one matrix after the other: compile
    time does not grow with the number of layers, and never more than one matrix is copied out of its leaf.
    """
    groups = collections.defaultdict(list)
    for path, view in views.items():
        groups[view.m, view.n, basis[path].shape[1:], basis[path].dtype, leaves[path].dtype].append(path)
    pick = lambda tree, paths: {path: tree[path] for path in paths}
    outcomes = [_refit_equal_shapes(fit, key, *(pick(t, g) for t in (leaves, views, basis, pending))) for g in groups.values()]
    merged = Refit(*(collections.ChainMap(*dicts) for dicts in zip(*outcomes, strict=True)))
    return Refit(*({path: field[path] for path in views} for field in merged))


def _refit_equal_shapes(fit, key, leaves, views, basis, pending) -> Refit:
    paths = list(views)
    leaf_of = [index for index, path in enumerate(paths) for _ in range(views[path].batch)]
    layer_of = [layer for path in paths for layer in range(views[path].batch)]
    names = [zlib.crc32(path.encode()) for path in paths]
    rank, dtype = basis[paths[0]].shape[2], basis[paths[0]].dtype
    identity = jnp.eye(rank, dtype=dtype)

    def one(matrix):
        leaf, layer, wait = matrix
        load = lambda branches: lax.switch(leaf, branches, layer)
        P = load([lambda i, P=basis[path]: P[i] for path in paths])
        kept = lambda: (P, identity, False, jnp.float32(0))

        def try_fit():
            G = load([lambda i, path=path: views[path].matrix(leaves[path], i) for path in paths]).astype(dtype)
            largest = jnp.max(jnp.abs(G))
            usable = jnp.isfinite(largest) & (largest > jnp.finfo(dtype).tiny)
            return lax.cond(usable, lambda: fitted(G / largest, largest), kept)

        def fitted(G, unit):
            sketch_key = jax.random.fold_in(jax.random.fold_in(key, jnp.array(names, jnp.uint32)[leaf]), layer)
            P_new = fit(sketch_key, G, P).astype(dtype)
            return P_new, matmul(P_new.T, P), True, (jnp.sum(jnp.square(G)) * unit**2).astype(jnp.float32)

        return lax.cond(wait, try_fit, kept)

    def all_of_them():
        stacked = lax.map(one, (jnp.array(leaf_of), jnp.array(layer_of), jnp.concatenate(list(pending.values()))))
        ends = [sum(views[path].batch for path in paths[: i + 1]) for i in range(len(paths))]
        split = lambda x: dict(zip(paths, jnp.split(x, ends[:-1]), strict=True))
        return Refit(*map(split, stacked))

    def none_of_them():
        per_matrix = lambda value: {path: jnp.broadcast_to(value, (view.batch, *value.shape)) for path, view in views.items()}
        return Refit(basis, per_matrix(identity), per_matrix(jnp.array(False)), per_matrix(jnp.float32(0)))

    return lax.cond(jnp.any(jnp.concatenate(list(pending.values()))), all_of_them, none_of_them)


def next_statistics(stats: Statistics, count, pending, fitted, finite, energy, total) -> Statistics:
    """Statistics after a step.

    Args:
      stats, count: before the step.
      pending, fitted, finite: dicts of (b,) bools: a refit was due, it took place, the gradient was finite.
      energy: dict of (b,) ‖R‖².
      total: dict of (b,) ‖G‖² where it was measured, else 0.
    """

    def leaf(last_fit, skips, captured, fit_norm, norm, pending, fitted, finite, energy, total):
        energy = jnp.where(finite, energy, 0.0).astype(jnp.float32)
        length = jnp.sqrt(energy)
        measured = finite & (total > 0)
        return (
            jnp.where(fitted, count, last_fit),
            pending & ~fitted,
            skips + ((pending & ~fitted) | ~finite),
            jnp.where(measured, energy / jnp.where(measured, total, 1.0), captured).astype(jnp.float32),
            jnp.where(fitted, length, fit_norm),
            jnp.where(fitted, length, jnp.where(finite, 0.9 * norm + 0.1 * length, norm)),
        )

    kept = (stats.last_fit, stats.skips, stats.captured, stats.fit_norm, stats.norm)
    seen = (pending, fitted, finite, energy, total)
    columns = {path: leaf(*(tree[path] for tree in kept + seen)) for path in stats.last_fit}
    return Statistics(*({path: column[i] for path, column in columns.items()} for i in range(6)))
