"""Timing side by side: candidates take turns, and ratios are medians over the turns, because shared machines drift."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def take_turns(
    candidates: Mapping[str, Callable[[], object]], repeats: int = 7
) -> dict[str, np.ndarray]:
    """Seconds of each call, (repeats,) a candidate, after one call that is not counted."""
    for call in candidates.values():
        jax.block_until_ready(call())
    seconds = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Median over the turns of one candidate's time by another's."""
    return float(np.median(numerator / denominator))


def milliseconds(seconds: np.ndarray) -> str:
    """Median, and in brackets the smallest and the largest."""
    low, mid, high = 1e3 * np.min(seconds), 1e3 * np.median(seconds), 1e3 * np.max(seconds)
    return f"{mid:.3g} [{low:.3g}, {high:.3g}]"


def machine() -> str:
    """One line on what was measured where."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax"))
    device = jax.devices()[0]
    return (
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
