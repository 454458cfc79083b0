"""What came out of compared optimizers: the front of loss against bytes, a table and figures."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox


class Entry(NamedTuple):
    """One contender: every finished rate with the first seed, and the best of them with every finished seed."""

    name: str
    optimizer: str
    grid: dict[float, dict[str, Any]]
    best_lr: float
    seeds: dict[int, dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [result["valid_loss"] for result in self.seeds.values()]

    @property
    def share(self) -> float:
        """State, of AdamW's."""
        first = self.grid[self.best_lr]
        return first["state_bytes"] / first["adamw_bytes"]

    @property
    def matrix_share(self) -> float:
        """The same of the matrices inside the layers."""
        return self.grid[self.best_lr]["matrix_share"]


def front(entries: Sequence[Entry]) -> list[Entry]:
    """Those that no other beats with as few bytes or fewer on the seed that all have, the smallest state first."""
    first = lambda entry: entry.grid[entry.best_lr]["valid_loss"]
    best, ahead = math.inf, []
    for entry in sorted(entries, key=lambda e: (e.share, first(e))):
        if first(entry) < best:
            best = first(entry)
            ahead.append(entry)
    return ahead


def paired(entry: Entry, baseline: Entry) -> tuple[str, str]:
    """Mean difference to the baseline over the seeds that both have, and its z: the mean by its standard error."""
    both = [seed for seed in entry.seeds if seed in baseline.seeds]
    differences = [entry.seeds[s]["valid_loss"] - baseline.seeds[s]["valid_loss"] for s in both]
    if entry.name == baseline.name or not both:
        return "–", "–"
    mean = np.mean(differences)
    error = np.std(differences, ddof=1) / len(both) ** 0.5 if len(both) > 1 else 0
    return f"{mean:+.4f}", f"{mean / error:+.1f}" if error else "–"


def table(entries: Sequence[Entry], baseline: str | None = None) -> str:
    """Markdown; a rate at the end of its grid is marked, for a better one may lie beyond."""
    names = ["optimizer", "learning rate", "validation loss", "seeds", "state, bytes", "of AdamW"]
    names += ["of its matrices", "ms/step"]
    against = next((e for e in entries if e.name == baseline), None)
    names += [f"− {baseline}", "z"] if against else []
    rows = [names, ["---"] * len(names)]
    ahead = front(entries)
    for e in entries:
        spread = f" ± {np.std(e.losses, ddof=1):.4f}" if len(e.losses) > 1 else ""
        edge = "*" if len(e.grid) > 1 and e.best_lr in (min(e.grid), max(e.grid)) else ""
        loss = f"{np.mean(e.losses):.4f}"
        row = [e.name, f"{e.best_lr:g}{edge}", (f"**{loss}**" if e in ahead else loss) + spread]
        row += [f"{len(e.losses)}", f"{e.grid[e.best_lr]['state_bytes']:,}", f"{e.share:.1%}"]
        row += [f"{e.matrix_share:.1%}", f"{np.mean([r['step_ms'] for r in e.seeds.values()]):.0f}"]
        rows.append(row + (list(paired(e, against)) if against else []))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if any("*" in row[1] for row in rows):
        lines.append("\n\\* the best of its grid is its end: a better rate may lie beyond.")
    if len(entries) > 1:
        lines.append("\nBold: on the first seed, no other has a smaller loss with as few bytes.")
    return "\n".join(lines)


def draw_curves(entries: Sequence[Entry], file: Path) -> None:
    """Validation loss over steps (best rate, mean over seeds), and at the end over the grid, where there is one."""
    searched = any(len(e.grid) > 1 for e in entries)
    fig = matplotlib.figure.Figure(figsize=(11 if searched else 6, 4), layout="constrained")
    curves, *rates = fig.subplots(1, 1 + searched, squeeze=False)[0]
    for e in entries:
        # without the loss before the first step, which would flatten all the others
        of = [dict(result["curve"][1:]) for result in e.seeds.values()]
        steps = sorted(set.intersection(*map(set, of)))  # where each seed was evaluated
        loss = [np.mean([curve[step] for curve in of]) for step in steps]
        curves.plot(steps, loss, marker="o", markersize=3, label=e.name)
    curves.set(xlabel="step", ylabel="validation loss (nats per token)", title="best learning rate")
    curves.legend()
    curves.grid(alpha=0.3)
    for axes in rates:
        draw_rates(axes, entries)
    fig.savefig(file, dpi=150)


def draw_rates(axes: Axes, entries: Sequence[Entry]) -> None:
    for e in entries:
        final = [result["valid_loss"] for result in e.grid.values()]
        axes.plot(list(e.grid), final, marker="o", markersize=3)  # in the colors of the curves
    axes.set(xlabel="learning rate", xscale="log", title="at the end, first seed")
    ticks = sorted({lr for e in entries for lr in e.grid})
    axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks], rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_front(entries: Sequence[Entry], file: Path) -> None:
    """Validation loss over the state, of AdamW's: of all parameters, and of the matrices alone."""
    fig = matplotlib.figure.Figure(figsize=(12, 5.5), layout="constrained")
    everything, matrices = fig.subplots(1, 2, sharey=True)
    panels = {
        everything: {e.name: e.share for e in entries},
        matrices: {e.name: e.matrix_share for e in entries},
    }
    for axes, shares in panels.items():
        draw_losses(axes, shares, entries)
    ahead = front(entries)
    shares, losses = [100 * e.share for e in ahead], [np.mean(e.losses) for e in ahead]
    everything.plot(shares, losses, color="0.8", linewidth=4, zorder=1)
    everything.set(ylabel="validation loss (nats per token)", title="all parameters")
    matrices.set(title="matrices of the layers")
    handles, labels = everything.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=8)
    fig.draw_without_rendering()  # now it is known where the points are
    for axes, shares in panels.items():
        write_names(axes, shares, entries)
    fig.savefig(file, dpi=150)


def draw_losses(axes: Axes, shares: dict[str, float], entries: Sequence[Entry]) -> None:
    """Mean and standard deviation over the shares; a color for each optimizer."""
    optimizers = dict.fromkeys(e.optimizer for e in entries)
    for i, optimizer in enumerate(optimizers):
        ours = [e for e in entries if e.optimizer == optimizer]
        spread = [np.std(e.losses, ddof=1) if len(e.losses) > 1 else 0 for e in ours]
        x, y = [100 * shares[e.name] for e in ours], [np.mean(e.losses) for e in ours]
        axes.errorbar(x, y, spread, fmt="o", color=f"C{i}", capsize=3, label=optimizer)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
    least = min(1, *(80 * share for share in shares.values()))
    axes.set(xlabel="state, % of AdamW's", xscale="log")
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_xlim(least, 130)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def write_names(axes: Axes, shares: dict[str, float], entries: Sequence[Entry]) -> None:
    """What a name has besides its optimizer, at the side of its point where it covers the fewest names and points."""
    at = {e.name: (100 * shares[e.name], np.mean(e.losses)) for e in entries}
    points = axes.transData.transform(list(at.values()))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]

    def write(e: Entry, side: tuple[int, int]) -> Annotation:
        (x, y), text = side, e.name.removeprefix(e.optimizer).strip(" ,")
        ha, va = ("right", "center", "left")[x + 1], ("top", "center", "bottom")[y + 1]
        near = {"xytext": (6 * x, 6 * y), "textcoords": "offset points"}
        return axes.annotate(text, at[e.name], **near, fontsize=7, ha=ha, va=va)

    def covered(e: Entry, side: tuple[int, int]) -> int:
        text = write(e, side)
        box = text.get_window_extent()
        text.remove()
        outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
        return sum(map(box.overlaps, taken)) + 100 * outside

    sides = [(x, y) for y in (0, 1, -1) for x in (1, -1, 0) if x or y]
    for e in entries:
        best = min(sides, key=functools.partial(covered, e))
        taken.append(write(e, best).get_window_extent())
