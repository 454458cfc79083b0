"""Figures: what is drawn are the numbers given, every panel and bar is labelled, and nothing covers anything else."""

import importlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import pyplot

import optax_lowrank as ol
from optax_lowrank import plot
from optax_lowrank.report import Diagnostics, LeafDiagnostics

STEPS = (0, 10, 20)


def leaf(rank, energy=(0.5,), age=(0,), skips=(0,)):
    rank, *rest = np.broadcast_arrays(*map(np.asarray, (rank, energy, age, skips)))
    return LeafDiagnostics(rank, *rest)


def of_layers(step, layers=4):
    """Two kinds of kernels; the rank of layer i is i above the step's."""
    return Diagnostics(
        {
            f"layers/{i}/{kind}": leaf([10 + step + i])
            for i in range(layers)
            for kind in ("up", "down")
        }
    )


MANY = {step: of_layers(step) for step in STEPS}


def covered(figure):
    """Pairs of panels and legends, with their labels, that lie on each other."""
    figure.draw_without_rendering()
    boxes = [part.get_tightbbox() for part in (*figure.axes, *figure.legends)]
    return [
        (i, j)
        for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_kinds_of_layers_have_a_median_and_a_band():
    figure = plot.history(MANY, ["rank"])
    (axes,) = figure.axes
    assert legend(figure) == ["layers/*/up", "layers/*/down"]
    for line, band in zip(axes.lines, axes.collections, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), STEPS)
        np.testing.assert_allclose(line.get_ydata(), [11.5, 21.5, 31.5])
        x, y = band.get_paths()[0].vertices.T
        for step in STEPS:
            assert {*y[x == step]} == {10 + step, 13 + step}


def test_few_leaves_have_a_line_each():
    few = {step: of_layers(step, layers=2) for step in STEPS}
    figure = plot.history(few, ["rank"])
    assert legend(figure) == [f"layers/{i}/{kind}" for i in range(2) for kind in ("up", "down")]
    assert not figure.axes[0].collections
    stack = plot.history({0: {"stack": leaf([1, 2, 9])}}, ["rank"])
    assert stack.axes[0].lines[0].get_ydata().tolist() == [2]
    assert len(stack.axes[0].collections) == 1


def test_pairs_are_as_good_as_a_mapping():
    figure = plot.history(reversed(MANY.items()), ["rank"])
    assert figure.axes[0].lines[0].get_xdata().tolist() == [*STEPS]


def test_panels():
    """One a field that has something to show, with a label and one axis of updates."""
    label = lambda figure: [axes.get_ylabel().split(",")[0] for axes in figure.axes]
    assert label(plot.history(MANY)) == ["rank", "captured energy"]
    skipped = {0: {"w": leaf([-1])}, 1: {"w": leaf([-1], skips=[2])}}
    figure = plot.history(skipped)
    assert label(figure) == ["captured energy", "skipped steps"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "optimizer updates"]
    assert figure.axes[0].get_shared_x_axes().joined(*figure.axes)
    assert label(plot.history(MANY, ["skips"])) == ["skipped steps"]  # rather than no panel at all


def test_what_is_not_known_is_not_drawn():
    before = leaf([0], energy=[0], age=[-1])
    seen = {0: {"w": before}, 1: {"w": leaf([3], energy=[0.25], age=[5])}}
    figure = plot.history(seen, ["rank", "captured_energy", "steps_since_refresh"])
    drawn = [np.ma.filled(axes.lines[0].get_ydata(), -1).tolist() for axes in figure.axes]
    assert drawn == [[-1, 3], [-1, 0.25], [-1, 5]]


def test_histories_that_cannot_be_drawn():
    with pytest.raises(
        ValueError, match=r"`fields` must be of rank, captured_energy, .*, got ranks"
    ):
        plot.history(MANY, ["ranks"])
    for nothing in ({}, {0: Diagnostics()}, []):
        with pytest.raises(ValueError, match="`history` has no basis in it"):
            plot.history(nothing)
    with pytest.raises(ValueError, match="`reports` is empty"):
        plot.memory({})


@pytest.fixture(scope="module")
def reports():
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"embed": {"embedding": struct(999, 256)}, "mlp": {"kernel": struct(256, 1024)}}
    made = {"GaLore": ol.galore(0.1, rank=64), "AdamW": optax.adamw(0.1), "SGD": optax.sgd(0.1)}
    return {name: ol.memory_report(tx, params) for name, tx in made.items()}


def test_bars(reports):
    figure = plot.memory(reports)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [*reports]
    assert axes.yaxis.get_inverted()
    assert axes.get_xlabel() == "optimizer state, MiB (% of AdamW's)"
    assert legend(figure) == ["projected leaves", "dense leaves"]  # counters are too small to see
    widths = [[bar.get_width() * 2**20 for bar in part] for part in axes.containers]
    dense, matrix = 2 * 4 * 999 * 256, 2 * 4 * 256 * 1024
    ours = reports["GaLore"].groups["mlp/kernel"].arrays
    np.testing.assert_allclose(widths, [[ours, 0, 0], [dense, dense + matrix, 0]])
    assert [bar.get_x() * 2**20 for bar in axes.containers[1]] == [ours, 0, 0]
    percent = 100 * reports["GaLore"].state / reports["AdamW"].adamw
    assert [text.get_text() for text in axes.texts] == [
        f"{reports['GaLore'].state / 2**20:.1f} MiB ({percent:.1f} %)",
        "4.0 MiB (100.0 %)",
        "0.0 MiB (0.0 %)",
    ]


def test_bars_of_nothing(reports):
    figure = plot.memory({"SGD": reports["SGD"]})
    assert figure.axes[0].get_xlabel() == "optimizer state, bytes (% of AdamW's)"


def test_nothing_covers_anything(reports):
    kinds = ["/".join(["a long name of a kind of layer"] * 2 + [str(i)]) for i in range(14)]
    long = {step: {f"{kind}/kernel": leaf([9], skips=[1]) for kind in kinds} for step in STEPS}
    for figure in (plot.history(MANY), plot.history(long), plot.memory(reports)):
        assert covered(figure) == []


def test_a_notebook_shows_a_figure_once():
    """As PNG, without pyplot, which would keep it and show it again."""
    figure = plot.history(MANY, ["rank"])
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "optax_lowrank.plot")
    with pytest.raises(ImportError, match=r'pip install "optax_lowrank\[plot\]"'):
        importlib.import_module("optax_lowrank.plot")
