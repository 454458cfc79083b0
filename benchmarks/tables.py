"""What a benchmark returns: a Markdown table, what to know about it, and a figure where it says something."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

import jax
from matplotlib.figure import Figure

from benchmarks.processes import threads


@dataclasses.dataclass
class Table:
    """`str()` is Markdown."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    figure: Figure | None = None

    def __str__(self):
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join([table, *self.notes])


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure: `quick` on shapes that only show that everything runs, `torch` a Python with the peers."""

    quick: bool = False
    torch: str | None = None


def machine() -> str:
    """One line on what was measured where."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax"))
    device = jax.devices()[0]
    return (
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, {threads()} threads, "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    )


def bars(xlabel: str, groups: Mapping[str, Mapping[str, float]], log: bool = False) -> Figure:
    """A panel a group, a horizontal bar a name, with its value; peers are grey."""
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    height = 0.3 * max(map(len, groups.values())) + 0.9
    figure = Figure((6 * columns, height * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (title, values), ax in zip(groups.items(), panels, strict=False):
        peer = [name.startswith(("optax", "torch", "jnp")) for name in values]
        colors = ["#b0b7bf" if grey else "#2a6f97" for grey in peer]
        drawn = ax.barh(list(values), list(values.values()), color=colors)
        text = lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}"
        ax.bar_label(drawn, fmt=text, padding=2, fontsize=8)
        ax.set(title=title, xlabel=xlabel, xscale="log" if log else "linear")
        ax.margins(x=0.15)
        ax.invert_yaxis()
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels:  # the place of a group that is not there
        ax.set_axis_off()
    return figure


def lines(
    xlabel: str, ylabel: str, series: Mapping[str, tuple[Sequence, Sequence]], log: bool = False
) -> Figure:
    """One line a name."""
    figure = Figure((8, 4), dpi=100, layout="constrained")
    ax = figure.subplots()
    for name, (x, y) in series.items():
        ax.plot(x, y, label=name, linewidth=1.2, marker="o" if len(x) < 10 else None, markersize=3)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure
