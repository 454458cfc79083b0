"""Figures of what bases did in a run, and of optimizers' bytes. Needs matplotlib: `pip install "optax_lowrank[plot]"`.

No function here shows a figure or touches pyplot: a notebook shows the one that a cell ends with, `savefig` writes it.
"""

import io
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from optax_lowrank.report import LeafDiagnostics, MemoryReport
from optax_lowrank.views import equal_leaves

try:
    from matplotlib import figure, ticker
except ImportError as error:
    raise ImportError(
        '`optax_lowrank.plot` needs matplotlib: pip install "optax_lowrank[plot]".'
    ) from error

FEW = 6  # leaves that have a line each
LABELS = {
    "rank": "rank, columns",
    "captured_energy": "captured energy, of ‖G‖²",
    "steps_since_refresh": "steps since refresh",
    "skips": "skipped steps, total",
}
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}


class Figure(figure.Figure):
    """A matplotlib figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()


def history(
    history: Mapping[int, Mapping[str, LeafDiagnostics]]
    | Iterable[tuple[int, Mapping[str, LeafDiagnostics]]],
    fields: Sequence[str] = ("rank", "captured_energy", "skips"),
) -> Figure:
    """What `diagnostics` said over a run, a panel a field.

    A line is the median over the matrices of a leaf, or, with more than six leaves, of all leaves whose paths differ
    only in numbers, as `memory_report` groups them; the band around it reaches from the least to the largest. A field
    that is zero or unknown all the time has no panel, unless none has anything else.

    Args:
      history: results of `diagnostics` by the number of optimizer updates, a mapping or pairs.
      fields: of `LeafDiagnostics`.

    Returns:
      A matplotlib `Figure`.

    Raises:
      ValueError: a field is unknown, or there is no basis in the history.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> from optax_lowrank import plot
      >>> params = {"kernel": jnp.eye(8)}
      >>> tx = ol.galore(1e-3, rank=2)
      >>> before = tx.init(params)
      >>> _, after = tx.update(params, before, params)
      >>> seen = {step: ol.diagnostics(state) for step, state in enumerate([before, after])}
      >>> figure = plot.history(seen)
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['rank, columns', 'captured energy, of ‖G‖²']
    """
    unknown = [field for field in fields if field not in LABELS]
    if unknown:
        raise ValueError(f"`fields` must be of {', '.join(LABELS)}, got {', '.join(unknown)}.")
    pairs = history.items() if isinstance(history, Mapping) else history
    seen = sorted(pairs, key=lambda pair: pair[0])
    leaves = {path: None for _, found in seen for path in found}
    if not leaves:
        raise ValueError("`history` has no basis in it: give it `diagnostics(state)` by step.")
    groups = {path: [path] for path in leaves} if len(leaves) <= FEW else equal_leaves(leaves)
    seen = [(step, jax.device_get(dict(found))) for step, found in seen]
    curves = {
        field: {name: _curve(seen, paths, field) for name, paths in groups.items()}
        for field in fields
    }
    some = lambda field: any(values.max() > 0 for _, values in curves[field].values())
    shown = [field for field in fields if some(field)] or fields

    columns = max(1, 100 // (10 + max(map(len, groups))))
    height = 0.6 + 2.2 * len(shown) + 0.22 * -(-len(groups) // columns)
    made = Figure(figsize=(8, height), layout="constrained")
    panels = made.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for field, axes in zip(shown, panels, strict=True):
        for i, (name, (steps, values)) in enumerate(curves[field].items()):
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
            marker = "." if len(steps) < 30 else ""
            axes.plot(steps, np.ma.median(values, axis=1), marker=marker, label=name, **style)
            if values.shape[1] > 1:
                band = values.min(axis=1), values.max(axis=1)
                axes.fill_between(steps, *band, color=style["color"], alpha=0.2, linewidth=0)
        axes.set_ylabel(LABELS[field])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=field != "captured_energy"))
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("optimizer updates")
    panels[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    made.legend(
        panels[0].lines, [*groups], loc="outside lower center", ncols=columns, frameon=False
    )
    return made


def _curve(seen, paths, field):
    """Steps, and the values (steps, matrices) of a field, masked where they are not known."""
    there = [
        (step, [found[path] for path in paths]) for step, found in seen if {*paths} <= {*found}
    ]
    rows = lambda name: [
        np.concatenate([np.ravel(getattr(leaf, name)) for leaf in leaves]) for _, leaves in there
    ]
    values = np.ma.masked_less(rows(field), 0)
    if field != "skips":
        values = np.ma.masked_where(np.less(rows("steps_since_refresh"), 0), values)
    return [step for step, _ in there], values


def memory(reports: Mapping[str, MemoryReport]) -> Figure:
    """Bytes of optimizers' states as bars: of projected leaves, of dense ones, and counters where they can be seen.

    Args:
      reports: results of `memory_report` by name; bars come in this order, from above.

    Returns:
      A matplotlib `Figure`; parameters and gradients, which the optimizer does not change, are not in it.

    Raises:
      ValueError: there is no report.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> from optax_lowrank import plot
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
      >>> ranks = {f"rank {r}": ol.memory_report(ol.galore(1e-3, rank=r), shapes) for r in (64, 256)}
      >>> plot.memory(ranks).axes[0].get_xlabel()
      "optimizer state, MiB (% of AdamW's)"
    """
    if not reports:
        raise ValueError("`reports` is empty: give it results of `memory_report` by name.")
    of = lambda report, projected: sum(
        group.arrays for group in report.groups.values() if group.projected == projected
    )
    parts = {
        "projected leaves": [of(report, True) for report in reports.values()],
        "dense leaves": [of(report, False) for report in reports.values()],
        "counters and statistics": [report.counters for report in reports.values()],
    }
    largest = max(report.state for report in reports.values())
    unit = next((unit for unit, size in UNITS.items() if largest >= size), "bytes")
    made = Figure(figsize=(8, 1.4 + 0.45 * len(reports)), layout="constrained")
    axes = made.subplots()
    left, bars = np.zeros(len(reports)), None
    seen = {part: sizes for part, sizes in parts.items() if max(sizes) >= largest / 500}
    for i, (part, sizes) in enumerate(seen.items()):
        widths = np.asarray(sizes) / UNITS[unit]
        bars = axes.barh([*reports], widths, left=left, label=part, color=f"C{i}")
        left += widths
    percent = lambda r: f" ({100 * r.state / r.adamw:.1f} %)" if r.adamw else ""
    totals = [f"{r.state / UNITS[unit]:,.1f} {unit}{percent(r)}" for r in reports.values()]
    axes.bar_label(bars, totals, padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(f"optimizer state, {unit} (% of AdamW's)")
    axes.spines[["top", "right"]].set_visible(False)
    made.legend(loc="outside lower center", ncols=3, frameon=False)
    return made
