"""When a basis is refit, and how: the policies, and one compiled fit per distinct folded shape.

A refresh policy answers "refit now?" from `(count, statistics after the previous step)`, with one bool for the whole
tree or one for each matrix. The answer for a single matrix is only ever looked at as a scalar inside a loop: a batched
predicate would turn `lax.cond` into a select that factorizes every matrix on every step.
"""

import collections
import functools
import itertools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_lowrank.bases import BasisStore
from optax_lowrank.fits import Fit
from optax_lowrank.linalg import matmul
from optax_lowrank.views import MatrixView


class Statistics(NamedTuple):
    """What the core knows of the k matrices of a tree: (k,) arrays, leaf by leaf in the order of `positions`."""

    last_fit: (
        jax.Array
    )  # int32, the count at the last refit, -1 before the first; changes on refresh
    pending: jax.Array  # bool, a refit is due and has not met a usable gradient yet
    skips: (
        jax.Array
    )  # int32, steps whose gradient was not finite, or no use for a refit that was due
    captured: (
        jax.Array
    )  # float32, ‖R‖² / ‖G‖² at the last refit; of every step, if the policy watches it
    fit_norm: jax.Array  # float32, ‖R‖ at the last refit
    norm: jax.Array  # float32, ‖R‖ averaged over the steps since then, decay 0.9


def positions(batches: Mapping[str, int]) -> dict[str, slice]:
    """Where the matrices of each leaf stand in `Statistics`, from the number of matrices of each: paths are sorted."""
    places, start = {}, 0
    for path in sorted(batches):
        places[path] = slice(start, start + batches[path])
        start += batches[path]
    return places


Policy = Callable[[jax.Array, Statistics], jax.Array]


def every(n: int, stagger: bool = False) -> Policy:
    """Refresh policy: at every n-th update, from update 0 on.

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
        k = stats.last_fit.size
        return (count + jnp.arange(k) * n // k) % n == 0

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
        age = count - stats.last_fit
        return (age >= max_gap) | ((age >= min_gap) & (stats.norm <= threshold * stats.fit_norm))

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
        age = count - stats.last_fit
        return (age >= max_gap) | ((age >= min_gap) & (stats.captured < min_captured))

    due.watches_captured = True  # asks `low_rank` to measure `captured` on every step
    return due


def as_policy(gap: jax.typing.ArrayLike | Policy) -> Policy:
    """The aliases' `update_proj_gap`: a policy as it is, a number as `every` so many updates."""
    return gap if callable(gap) else every(gap)


def in_windows(policy: Policy, k: int) -> Policy:
    """Refresh policy for windows of k micro-batches: `policy`, counting windows, at the first micro-batch of each.

    Args:
      policy: any other one.
      k: micro-batches of a window, see `accumulated`.

    Returns:
      A policy.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> inner = ol.accumulated(optax.scale_by_adam(), k=4)
      >>> tx = ol.low_rank(inner, rank=4, refresh=ol.in_windows(ol.every(200), k=4))
    """
    if k == 1:
        return policy

    def due(count, stats):
        last_fit = stats.last_fit // k  # −1, never yet, stays −1
        return (count % k == 0) & policy(count // k, stats._replace(last_fit=last_fit))

    due.watches_captured = getattr(policy, "watches_captured", False)
    return due


def _check_gaps(min_gap, max_gap):
    if isinstance(min_gap, int) and isinstance(max_gap, int) and not 1 <= min_gap <= max_gap:
        raise ValueError(f"a policy needs 1 <= min_gap <= max_gap, got {min_gap=} and {max_gap=}.")


class Refit(NamedTuple):
    """Outcome of the refresh of one step."""

    basis: dict[str, Any]  # (b, m, r) as stored
    rotation: dict[str, jax.Array]  # (b, r, r), P_newᵀ P_old; the identity where not fitted
    fitted: jax.Array  # (k,) bool
    energy: jax.Array  # (k,) float32, ‖G‖² where fitted


def initial_statistics(k: int) -> Statistics:
    """Statistics before the first step: all k matrices wait for a basis."""
    zeros = lambda: jnp.zeros(k, jnp.float32)
    return Statistics(
        jnp.full(k, -1, jnp.int32),
        jnp.ones(k, bool),
        jnp.zeros(k, jnp.int32),
        zeros(),
        zeros(),
        zeros(),
    )


def refit(
    fit: Fit, store: BasisStore, key, leaves, views: Mapping[str, MatrixView], basis, pending
) -> Refit:
    """Refits the matrices in `pending` whose gradient is finite and nonzero; the others keep their basis.

    Leaves of equal folded shape share one compiled fit, which a loop applies to one matrix after the other: compile
    time does not grow with the number of layers, and never more than one matrix is copied out of its leaf.
    """
    groups = collections.defaultdict(list)
    for path in sorted(views):
        view, P = views[path], jax.tree.leaves(basis[path])[-1]
        groups[view.m, view.n, P.shape[2], P.dtype, leaves[path].dtype].append(path)
    places = positions({path: view.batch for path, view in views.items()})
    bases, rotations, fitted, energy, order = {}, {}, [], [], []
    for paths in groups.values():
        index = jnp.concatenate([jnp.arange(places[p].start, places[p].stop) for p in paths])
        pick = lambda tree, paths=paths: {path: tree[path] for path in paths}
        group = _refit_equal_shapes(
            fit, store, tuple(pick(views).items()), key, pick(leaves), pick(basis), pending[index]
        )
        bases |= group.basis
        rotations |= group.rotation
        fitted.append(group.fitted)
        energy.append(group.energy)
        order.append(index)
    in_place = jnp.argsort(jnp.concatenate(order))
    return Refit(
        bases, rotations, jnp.concatenate(fitted)[in_place], jnp.concatenate(energy)[in_place]
    )


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2)
)  # so that a step outside jit does not compile it again
def _refit_equal_shapes(fit, store, views, key, leaves, basis, pending) -> Refit:
    views = dict(views)
    paths = list(views)
    m, r = views[paths[0]].m, jax.tree.leaves(basis[paths[0]])[-1].shape[2]
    batches = [view.batch for view in views.values()]
    leaf_of = jnp.array([leaf for leaf, b in enumerate(batches) for _ in range(b)])
    layer_of = jnp.array([layer for b in batches for layer in range(b)])
    names = jnp.array([zlib.crc32(path.encode()) for path in paths], jnp.uint32)
    dtype = jnp.promote_types(leaves[paths[0]].dtype, jnp.float32)
    identity = jnp.eye(r, dtype=dtype)

    def one(matrix):
        leaf, layer, wait = matrix
        load = lambda read: lax.switch(
            leaf, [lambda i, path=path: read(path, i) for path in paths], layer
        )
        stored = load(lambda path, i: jax.tree.map(lambda x: x[i], basis[path]))
        keep = lambda: (stored, identity, False, jnp.float32(0))  # the basis bit for bit

        def try_fit():
            G = load(lambda path, i: views[path].matrix(leaves[path], i)).astype(dtype)
            largest = jnp.max(jnp.abs(G))
            usable = jnp.isfinite(largest) & (largest > jnp.finfo(dtype).tiny)
            return lax.cond(usable, lambda: fit_one(G / largest, largest), keep)

        def fit_one(G, unit):
            sketch_key = jax.random.fold_in(jax.random.fold_in(key, names[leaf]), layer)
            P = store.decode(stored, m, dtype)
            new = store.encode(fit(sketch_key, G, P))
            return (
                new,
                matmul(store.decode(new, m, dtype).T, P),
                True,
                (jnp.sum(jnp.square(G)) * unit**2).astype(jnp.float32),
            )

        return lax.cond(wait, try_fit, keep)

    def loop():
        P, Q, fitted, energy = lax.map(one, (leaf_of, layer_of, pending))
        ends = list(itertools.accumulate(batches))
        split = lambda tree: {
            path: jax.tree.map(lambda x, end=end, b=b: x[end - b : end], tree)
            for path, end, b in zip(paths, ends, batches, strict=True)
        }
        return Refit(split(P), split(Q), fitted, energy)

    def skip():
        rotation = {
            path: jnp.broadcast_to(identity, (view.batch, *identity.shape))
            for path, view in views.items()
        }
        return Refit(
            basis, rotation, jnp.zeros_like(pending), jnp.zeros(pending.shape, jnp.float32)
        )

    return lax.cond(jnp.any(pending), loop, skip)


def next_statistics(stats: Statistics, count, pending, fitted, finite, energy, total) -> Statistics:
    """Statistics after a step; all arguments but `count` are (k,).

    Args:
      stats, count: before the step.
      pending, fitted, finite: bool: a refit was due, it took place, the gradient was finite.
      energy: ‖R‖².
      total: ‖G‖² where it was measured, else 0.
    """
    energy = jnp.where(finite, energy, 0).astype(jnp.float32)
    length = jnp.sqrt(energy)
    measured = finite & (total > 0)
    return Statistics(
        last_fit=jnp.where(fitted, count, stats.last_fit),
        pending=pending & ~fitted,
        skips=stats.skips + ((pending & ~fitted) | ~finite),
        captured=jnp.where(measured, energy / jnp.where(measured, total, 1), stats.captured),
        fit_norm=jnp.where(fitted, length, stats.fit_norm),
        norm=jnp.where(
            fitted, length, jnp.where(finite, 0.9 * stats.norm + 0.1 * length, stats.norm)
        ),
    )
