"""When a basis is refit: refresh policies, and the statistics that they decide by.

A policy answers "refit now?" from `(count, statistics after the previous step)`, with one bool for the whole tree or
one for each matrix. Policies are values: two of equal arguments are equal.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_lowrank import checks


class Statistics(NamedTuple):
    """What the core knows of the k matrices of a tree: (k,) arrays, leaf by leaf in the order of `positions`."""

    last_fit: jax.Array  # int32, the count at the last refit, -1 before the first
    pending: jax.Array  # bool, a refit is due and has not met a usable gradient yet
    skips: jax.Array  # int32, steps whose gradient was not finite, or no use for a due refit
    captured: jax.Array  # float32, ‖R‖² / ‖G‖² at the last refit, or of each step if it is watched
    fit_norm: jax.Array  # float32, ‖R‖ at the last refit
    norm: jax.Array  # float32, ‖R‖ averaged over the steps since then, decay 0.9
    finite: jax.Array  # bool, was the last step finite? If not, the matrix was skipped


def initial_statistics(k: int) -> Statistics:
    """Statistics before the first step: all k matrices wait for a basis."""
    zeros = lambda dtype: jnp.zeros(k, dtype)
    return Statistics(
        last_fit=jnp.full(k, -1, jnp.int32),
        pending=jnp.ones(k, bool),
        skips=zeros(jnp.int32),
        captured=zeros(jnp.float32),
        fit_norm=zeros(jnp.float32),
        norm=zeros(jnp.float32),
        finite=jnp.ones(k, bool),
    )


def next_statistics(stats: Statistics, count, pending, fitted, finite, energy, total) -> Statistics:
    """Statistics after a step; all arguments but `count` are (k,).

    Args:
      stats, count: before the step.
      pending, fitted, finite: bool: a refit was due, it took place, the step was finite.
      energy: ‖R‖².
      total: ‖G‖² where it was measured, else 0.
    """
    length = jnp.sqrt(jnp.where(finite, energy, 0))
    measured = finite & (total > 0)
    average = jnp.where(finite, 0.9 * stats.norm + 0.1 * length, stats.norm)
    return Statistics(
        last_fit=jnp.where(fitted, count, stats.last_fit),
        pending=pending & ~fitted,
        skips=stats.skips + ((pending & ~fitted) | ~finite).astype(jnp.int32),
        captured=jnp.where(measured, length**2 / jnp.where(measured, total, 1), stats.captured),
        fit_norm=jnp.where(fitted, length, stats.fit_norm),
        norm=jnp.where(fitted, length, average),
        finite=finite,
    )


def positions(batches: Mapping[str, int]) -> dict[str, slice]:
    """Where the matrices of each leaf stand in `Statistics`, from the number of matrices of each: paths are sorted."""
    places, start = {}, 0
    for path in sorted(batches):
        places[path] = slice(start, start + batches[path])
        start += batches[path]
    return places


Policy = Callable[[jax.Array, Statistics], jax.Array]


@dataclasses.dataclass(frozen=True)
class every:
    """Refresh policy: at every n-th update, from update 0 on.

    Args:
      n: updates between refits of a matrix, ≥ 1; may be traced, and is rounded, as schedules have floats.
      stagger: give each matrix (each layer of a stack) a phase of its own, so that no step refits them all. The first
        fit is at update 0 all the same. Phases follow the order of the leaves.

    Raises:
      ValueError: n < 1.

    Example:
      >>> import optax_lowrank as ol
      >>> [count for count in range(10) if ol.every(4)(count, None)]
      [0, 4, 8]
    """

    n: int
    stagger: bool = False

    def __post_init__(self):
        checks.number("n", self.n)
        if checks.is_integer(self.n) and self.n < 1:
            need = "`update_proj_gap`, n of `every`, must be a positive number of updates"
            raise ValueError(f"{need}, got {self.n}.")

    def __call__(self, count, stats):
        """() bool, or (k,) if staggered."""
        n = self.n
        if not checks.is_integer(n):
            n = jnp.maximum(jnp.round(n), 1).astype(jnp.int32)
        if not self.stagger:
            return count % n == 0
        k = stats.last_fit.size
        return (count + jnp.arange(k, dtype=jnp.int32) * n // k) % n == 0


@dataclasses.dataclass(frozen=True)
class on_convergence:
    """Refresh policy: when the projected gradient has shrunk, ‖R‖ ≤ threshold · ‖R at the last refit‖.

    ‖R‖ is averaged over steps (decay 0.9), since one mini-batch says little.

    Args:
      threshold: relative norm, in (0, 1).
      min_gap: at least so many updates between refits of a matrix.
      max_gap: refit after so many updates in any case.

    Raises:
      ValueError: not 1 ≤ min_gap ≤ max_gap.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> tx = ol.low_rank(optax.scale_by_adam(), rank=4, refresh=ol.on_convergence(0.3, min_gap=50, max_gap=500))

    Reference: Refael et al. (AdaRankGrad), arXiv:2410.17881. Their criterion is an absolute norm, which mini-batch
      gradients never reach; ours is relative.
    """

    threshold: float = 0.1
    min_gap: int = 20
    max_gap: int = 200

    def __post_init__(self):
        checks.number("threshold", self.threshold, 0, 1)
        _check_gaps(self.min_gap, self.max_gap)

    def __call__(self, count, stats):
        """(k,) bool."""
        age = count - stats.last_fit
        shrunk = stats.norm <= self.threshold * stats.fit_norm
        return (age >= self.max_gap) | ((age >= self.min_gap) & shrunk)


@dataclasses.dataclass(frozen=True)
class on_staleness:
    """Refresh policy: when the basis holds too little of its gradient, ‖R‖² < min_captured · ‖G‖².

    Watching ‖G‖ costs one pass over each gradient on every step; the other policies do without.

    Args:
      min_captured: share of the squared norm, in (0, 1).
      min_gap: at least so many updates between refits of a matrix.
      max_gap: refit after so many updates in any case.

    Raises:
      ValueError: not 1 ≤ min_gap ≤ max_gap.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> tx = ol.low_rank(optax.scale_by_adam(), rank=4, refresh=ol.on_staleness(0.6))
    """

    min_captured: float = 0.5
    min_gap: int = 20
    max_gap: int = 200
    watches_captured = True  # asks `low_rank` to measure `captured` on every step

    def __post_init__(self):
        checks.number("min_captured", self.min_captured, 0, 1)
        _check_gaps(self.min_gap, self.max_gap)

    def __call__(self, count, stats):
        """(k,) bool."""
        age = count - stats.last_fit
        stale = stats.captured < self.min_captured
        return (age >= self.max_gap) | ((age >= self.min_gap) & stale)


@dataclasses.dataclass(frozen=True)
class in_windows:
    """Refresh policy for windows of k micro-batches: `policy`, counting windows, at the first micro-batch of each.

    Args:
      policy: any other one.
      k: micro-batches of a window, see `accumulated`.

    Raises:
      ValueError: k < 1.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> inner = ol.accumulated(optax.scale_by_adam(), k=4)
      >>> tx = ol.low_rank(inner, rank=4, refresh=ol.in_windows(ol.every(200), k=4))
    """

    policy: Policy
    k: int

    def __post_init__(self):
        if not checks.is_integer(self.k) or self.k < 1:
            raise ValueError(f"`in_windows` needs k >= 1 micro-batches, got {self.k!r}.")

    @property
    def watches_captured(self) -> bool:
        """As `policy`."""
        return getattr(self.policy, "watches_captured", False)

    def __call__(self, count, stats):
        """() or (k,) bool."""
        last_fit = stats.last_fit // self.k  # −1, never yet, stays −1
        due = self.policy(count // self.k, stats._replace(last_fit=last_fit))
        return (count % self.k == 0) & due


def as_policy(gap: jax.typing.ArrayLike | Policy, accumulate: int = 1) -> Policy:
    """The aliases' `update_proj_gap`: a policy as it is, a number as `every` so many updates, in windows of k.

    Raises:
      TypeError, ValueError: it is neither, or not positive.
    """
    is_policy = callable(gap) and not isinstance(gap, type) and checks.takes(gap, 2)
    if not (is_policy or checks.is_integer(gap) or hasattr(gap, "dtype")):
        raise TypeError(
            "`update_proj_gap` must be a number of updates or a policy such as `every(200)`, got "
            f"{checks.shown(gap)}. A policy takes `(count, stats)`, and `every` must be called to be one; schedules go "
            "through `inject_hyperparams(optimizer)(..., update_proj_gap=schedule)`."
        )
    policy = gap if callable(gap) else every(gap)
    return policy if accumulate == 1 else in_windows(policy, accumulate)


def _check_gaps(min_gap, max_gap):
    if isinstance(min_gap, int) and isinstance(max_gap, int) and not 1 <= min_gap <= max_gap:
        raise ValueError(f"a policy needs 1 <= min_gap <= max_gap, got {min_gap=} and {max_gap=}.")
