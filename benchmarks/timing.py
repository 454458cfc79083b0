"""Timing side by side: candidates take turns, and ratios are medians over the turns, because shared machines drift."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

NOTE = "Times are medians of calls taken in turns, [smallest, largest]; ratios are medians over the turns."


def clocked(call: Callable[[], object]) -> Callable[[], float]:
    """`call`, finished on the device, as a candidate that tells its seconds."""

    def seconds():
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return seconds


def take_turns(
    candidates: Mapping[str, Callable[[], float]],
    repeats: int = 7,
    budget: float = 60.0,
    warm: bool = False,
) -> dict[str, np.ndarray]:
    """Seconds of each call, (turns,) a candidate, after one call that is not counted unless all are `warm`.

    There are `repeats` turns, but no further one after `budget` seconds: a slow peer gets fewer.
    """
    end = time.perf_counter() + budget
    if not warm:
        for call in candidates.values():
            call()
    seconds = {name: [] for name in candidates}
    for turn in range(repeats):
        if turn and time.perf_counter() > end:
            break
        for name, call in candidates.items():
            seconds[name].append(call())
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Median over the turns of one candidate's time by another's."""
    return float(np.median(numerator / denominator))


def milliseconds(seconds: np.ndarray) -> str:
    """Median, and in brackets the smallest and the largest."""
    low, mid, high = 1e3 * np.min(seconds), 1e3 * np.median(seconds), 1e3 * np.max(seconds)
    return f"{mid:.3g} [{low:.3g}, {high:.3g}]"
