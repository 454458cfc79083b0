"""Figures of a run, finished or not: its losses, what its bases capture, and ranks where they change."""

from pathlib import Path

import matplotlib
import matplotlib.figure
import numpy as np

from lib.runs import Metrics

Bases = dict[str, dict[str, list[float]]]


def draw(metrics: Metrics, title: str, folder: Path) -> None:
    """`loss.png`, with bases `energy.png`, and where ranks change `ranks.png`."""
    draw_losses(metrics, title, folder / "loss.png")
    steps, bases = metrics.series("bases")
    steps, bases = steps[1:], bases[1:]  # there are none before the first step
    if not bases:
        return
    energy = "energy of the gradient in the basis, at its refit"
    draw_bases(steps, bases, "captured_energy", title, energy, folder / "energy.png")
    if any(of["rank"] != bases[0][path]["rank"] for record in bases for path, of in record.items()):
        draw_bases(steps, bases, "rank", title, "mean active rank", folder / "ranks.png")


def draw_losses(metrics: Metrics, title: str, file: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*metrics.series("loss"), linewidth=0.8, alpha=0.6, label="training")
    axes.plot(*metrics.series("valid_loss"), marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def draw_bases(
    steps: list[int], bases: list[Bases], key: str, title: str, label: str, file: Path
) -> None:
    """Mean over the attention and over the MLP kernels of each layer; a part without bases has no panel."""
    layers = 1 + max(int(path.split("/")[1]) for path in bases[0])
    of = lambda layer, part: [p for p in bases[0] if p.startswith(f"layers/{layer}/{part}/")]
    parts = [p for p in ("attention", "mlp") if any(of(layer, p) for layer in range(layers))]
    figure = matplotlib.figure.Figure(figsize=(1 + 4 * len(parts), 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, parts, strict=True):
        axes.set_prop_cycle(color=matplotlib.colormaps["viridis"](np.linspace(0, 1, layers)))
        for layer in range(layers):
            if paths := of(layer, part):
                values = [np.mean([record[path][key] for path in paths]) for record in bases]
                axes.plot(steps, values, marker="o", markersize=3, label=f"layer {layer}")
        top = 1.05 if key == "captured_energy" else None
        axes.set(xlabel="step", title=part, xlim=(0, None), ylim=(0, top))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    panels[-1].legend(ncols=1 + layers // 12, fontsize="small")
    figure.savefig(file, dpi=150)
