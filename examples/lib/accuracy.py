"""How well classes are found: scores, and a table and confusion matrices of several methods."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Counts (classes, classes): truth down, prediction across."""
    return np.bincount(truth * classes + found, minlength=classes**2).reshape(classes, classes)


def scores(counts: np.ndarray) -> tuple[float, float]:
    """Accuracy and macro-F1 of a confusion matrix; a class that is never met nor predicted counts 0."""
    right = np.diag(counts)
    f1 = 2 * right / np.maximum(counts.sum(0) + counts.sum(1), 1)
    return float(right.sum() / counts.sum()), float(f1.mean())


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method: every rate with the first seed, and the best rate with all seeds."""

    method: str
    grid: dict[float, dict[str, Any]]
    best_lr: float
    seeds: list[dict[str, Any]]


def table(entries: Sequence[Entry]) -> str:
    """Markdown; a rate at the end of its grid is marked, for a better one may lie beyond."""
    lines = [
        "| method | learning rate | accuracy, % | macro-F1, % | trainable, bytes | state, bytes | s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        edge = "*" if len(e.grid) > 1 and e.best_lr in (min(e.grid), max(e.grid)) else ""
        percent = [spread([100 * r[k] for r in e.seeds]) for k in ("accuracy", "macro_f1")]
        first, seconds = e.seeds[0], np.mean([r["wall_s"] for r in e.seeds])
        lines.append(
            f"| {e.method} | {e.best_lr:g}{edge} | {percent[0]} | {percent[1]} "
            f"| {first['trainable_bytes']:,} | {first['state_bytes']:,} | {seconds:.0f} |"
        )
    if any("*" in line for line in lines):
        lines.append("\n\\* the best of its grid is its end: a better rate may lie beyond.")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def figure(entries: Sequence[Entry], file: Path | None = None) -> matplotlib.figure.Figure:
    """Confusion matrix of every method, best rate, all seeds together; colours are shares of a class."""
    columns = min(len(entries), 4)
    rows = -(-len(entries) // columns)
    fig = matplotlib.figure.Figure(figsize=(3.6 * columns, 3.6 * rows), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False).flat
    for axes in panels[len(entries) :]:
        axes.remove()
    for axes, e in zip(panels, entries, strict=False):
        counts = np.sum([r["confusion"] for r in e.seeds], axis=0)
        names = e.seeds[0]["classes"]
        axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), "Blues", vmin=0, vmax=1)
        axes.set(title=e.method, xlabel="found", ylabel="is")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        if len(names) <= 10:
            for (i, j), n in np.ndenumerate(counts):
                dark = n > 0.5 * counts[i].sum()
                axes.text(
                    j, i, n or "", ha="center", va="center", fontsize=6, color="w" if dark else "k"
                )
    if file:
        fig.savefig(file, dpi=150)
    return fig
