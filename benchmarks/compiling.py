"""Seconds from an optimizer to a program: tracing and compiling, nothing allocated."""

import time

import jax
import numpy as np

from benchmarks.tables import Options, Table, lines
from benchmarks.timing import NOTE, ratio, take_turns
from benchmarks.trees import M60, QUICK, compile_step, optimizers, shapes

NAMES = ("optax.adamw", "optax.contrib.galore", "galore")


def compiling(options: Options) -> Table:
    """Trace and compile of update and apply, for equal layers of LLaMA-60M apart and stacked (8: the model's)."""
    size = QUICK if options.quick else M60
    depths = (1,) if options.quick else (8, 16, 32)
    txs = optimizers(size)
    rows, series = [], {}
    for stack in (False, True):
        for depth in depths:
            tree = shapes(size._replace(layers=depth), stack)
            # no stacked layers in contrib.galore: it would compile plain Adam
            skip = "optax.contrib.galore" if stack else None
            names = [name for name in txs if name in NAMES and name != skip]
            calls = {name: lambda name=name, tree=tree: _seconds(txs[name], tree) for name in names}
            seconds = take_turns(calls, 3, budget=12, warm=True)
            for name, values in seconds.items():
                how = "stacked" if stack else "apart"
                cells = (f"{np.median(values):.2f} [{np.min(values):.2f}, {np.max(values):.2f}]",)
                by_adamw = f"{ratio(values, seconds['optax.adamw']):.1f}×"
                rows.append((how, str(depth), name, *cells, by_adamw))
                xs, ys = series.setdefault(f"{name}, {how}", ([], []))
                xs.append(depth)
                ys.append(float(np.median(values)))
    figure = lines("layers", "trace + compile, s", series, log=True)
    return Table(("layers", "how many", "optimizer", "s", "by adamw"), rows, (NOTE,), figure)


def _seconds(tx, tree) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    compile_step(tx, tree)
    return time.perf_counter() - start
