"""Optimizer steps on the matrices of a Llama: between refreshes, at a refresh, and over three intervals."""

import numpy as np
import optax

import optax_lowrank as ol
from benchmarks.processes import HINT, peers
from benchmarks.tables import Options, Table, bars, lines
from benchmarks.timing import NOTE, clocked, milliseconds, ratio, take_turns
from benchmarks.trees import (
    M60,
    M130,
    ONE_LAYER,
    QUICK,
    Run,
    Size,
    all_shapes,
    apart,
    optimizers,
    stacked,
)

FIRST = ("optax.adamw", "optax.contrib.galore", "galore", 'galore(side="long")', "fira", "apollo")
TORCH = ("AdamW", "galore-torch", "fira", "apollo-torch")
WITHOUT_REFRESH = ("optax.adamw", "optax.contrib.muon", "torch: AdamW")
SAME_METHOD = {
    "galore": "torch: galore-torch",
    "fira": "torch: fira",
    "apollo": "torch: apollo-torch",
}
HEADER = (
    "matrices",
    "optimizer",
    "ms between refreshes",
    "by adamw",
    "by contrib.galore",
    "by the same in PyTorch",
    "ms with a refresh",
    "by a step without",
)


class Case:
    """Optimizers side by side on one tree: `between` and `refresh` are their seconds, (turns,) each."""

    def __init__(
        self,
        options: Options,
        size: Size,
        names: tuple[str, ...],
        torch: tuple[str, ...] = (),
        stack: bool = False,
        svd: bool = True,
        budget: float = 45.0,
    ):
        """Without `svd`, those whose refresh is a full SVD are timed between refreshes, on a basis put in place."""
        self.title = f"{size.name}, stacked" if stack else size.name
        grads = apart(size)
        # contrib.galore takes no stacked layers: it steps the same gradients, layers apart
        of = lambda name: grads if name == "optax.contrib.galore" or not stack else tree
        tree = stacked(size, grads) if stack else grads
        chosen = optimizers(size)
        runs = {name: Run(tx, of(name)) for name, tx in chosen.items() if name in names}
        with peers(options.torch, all_shapes(size), size.rank, torch) as process:
            steps = {name: clocked(run) for name, run in runs.items()}
            refresh = {name: _with_refresh(run) for name, run in runs.items()}
            if process:
                last = np.asarray(list(grads.values())[-1]["kernel"])
                np.testing.assert_allclose(process.checksum, np.abs(last).sum(), rtol=1e-6)
                steps |= {f"torch: {name}": process.call("step", name) for name in torch}
                refresh |= {f"torch: {name}": process.call("refresh", name) for name in torch}
            left_out = list(WITHOUT_REFRESH)
            if not svd:
                runs["optax.contrib.galore"].set_count(1)
                for name in torch if process else ():
                    process.call("start", name)()
                left_out += ["optax.contrib.galore", *(f"torch: {name}" for name in torch)]
            refresh = {name: call for name, call in refresh.items() if name not in left_out}
            # these first: a first step has to fit a basis anyway, and the SVDs of a whole tree take long
            self.refresh = take_turns(refresh, 3, budget / 2, warm=True)
            self.between = take_turns(steps, 9, budget)

    def rows(self) -> list[tuple[str, ...]]:
        return [(self.title, name, *self._cells(name)) for name in self.between]

    def medians(self) -> dict[str, float]:
        """Milliseconds between refreshes."""
        return {name: 1e3 * float(np.median(seconds)) for name, seconds in self.between.items()}

    def _cells(self, name):
        between, refresh = self.between[name], self.refresh.get(name)
        by = lambda other: (
            f"{ratio(between, self.between[other]):.2f}×" if other in self.between else "–"
        )
        yield milliseconds(between)
        yield by("optax.adamw")
        yield by("optax.contrib.galore")
        yield by(SAME_METHOD.get(name))
        yield "–" if refresh is None else milliseconds(refresh)
        yield "–" if refresh is None else f"{np.median(refresh) / np.median(between):.2f}×"


def _with_refresh(run):
    def seconds():
        run.set_count(0)
        return clocked(run)()

    return seconds


def _table(options, cases, notes) -> Table:
    figure = bars("ms between refreshes", {case.title: case.medians() for case in cases}, log=True)
    notes = (*notes, NOTE) if options.torch else (*notes, NOTE, HINT)
    return Table(HEADER, [row for case in cases for row in case.rows()], notes, figure)


def steps(options: Options) -> Table:
    """Update and apply on all matrices of LLaMA-60M and 130M, r = d/4, float32, parameters and state donated."""
    small, large = (QUICK, QUICK) if options.quick else (M60, M130)
    cases = [
        Case(options, small, tuple(optimizers(small)), TORCH, budget=40),
        Case(options, small, FIRST, stack=True, budget=20),
        Case(options, large, FIRST, ("galore-torch",), stack=True, budget=20),
    ]
    note = (
        "`optax.contrib.galore` and PyTorch have no stacked layers: there they step the same gradients, layers apart. "
        "`fira`, `galore` and `apollo` project the shorter side, as PyTorch does, `optax.contrib.galore` and "
        "`low_rank_muon` the longer one."
    )
    return _table(options, cases, (note,))


def layers(options: Options) -> Table:
    """Update and apply on the seven matrices of one layer of LLaMA-1B and of 7B, r = d/4, float32."""
    one, seven = (QUICK, QUICK) if options.quick else ONE_LAYER
    cases = [
        Case(options, one, FIRST, ("galore-torch",), budget=20),
        Case(options, seven, FIRST[:4], ("galore-torch",), svd=False, budget=20),
    ]
    note = (
        "Left out: refreshes of the 7B layer by full SVD, minutes each. These optimizers step with another basis: zero "
        "in `optax.contrib.galore`, random in PyTorch."
    )
    return _table(options, cases, (note,))


def stalls(options: Options) -> Table:
    """Every step of three refresh intervals, matrices of LLaMA-60M, after a first step that fits all bases."""
    size, gap = (QUICK, 4) if options.quick else (M60, 56)
    r = {"rank": size.rank}

    spread, often = ol.every(gap, stagger=True), ol.every(gap // 4, stagger=True)
    grads = apart(size)
    tree = stacked(size, grads)
    candidates = {
        "optax.adamw": (optax.adamw(1e-3), grads),
        "optax.contrib.galore": (
            optax.contrib.galore(1e-3, update_proj_gap=gap, **r),
            grads,
        ),
        f"galore, every({gap})": (ol.galore(1e-3, update_proj_gap=gap, **r), grads),
        f"galore, every({gap}, stagger=True)": (
            ol.galore(1e-3, update_proj_gap=spread, **r),
            grads,
        ),
        f"galore, every({gap}, stagger=True), stacked": (
            ol.galore(1e-3, update_proj_gap=spread, **r),
            tree,
        ),
        f"galore, subspace_iteration(), every({gap // 4}, stagger=True)": (
            ol.galore(1e-3, update_proj_gap=often, fit=ol.subspace_iteration(), **r),
            grads,
        ),
    }
    runs = {name: Run(tx, tree) for name, (tx, tree) in candidates.items()}
    # the call before the clock starts is step 0, so that the first interval begins at step 1
    seconds = take_turns(
        {name: clocked(run) for name, run in runs.items()}, 3 * gap, budget=float("inf")
    )
    rows, series = [], {}
    for name, values in seconds.items():
        whole = len(values) // gap * gap
        phases = np.median(
            values[:whole].reshape(-1, gap), axis=0
        )  # the same step of each interval
        middle = np.median(values)
        worst, longest = np.max(phases) / middle, np.max(values) / middle
        cells = (milliseconds(values), f"{worst:.2f}×", f"{longest:.2f}×", str(len(values)))
        rows.append((name, *cells))
        series[name] = (np.arange(1, len(values) + 1), 1e3 * values)
    header = ("optimizer", "ms", "worst step by the median step", "longest by the median", "steps")
    note = (
        "Worst: of the medians of equal steps of the three intervals, which one-off delays of the machine do not move. "
        f"Longest: of all. One matrix of {7 * size.layers} is refit on a staggered step."
    )
    return Table(header, rows, (note, NOTE), lines("step", "ms", series, log=True))
