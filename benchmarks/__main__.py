"""Measure side by side with peers and write `benchmarks/results/`: `python -m benchmarks [TABLE …]`.

`python -m benchmarks --target h100` compiles for a device that is not here instead.
"""

import os

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # threaded LAPACK beside a busy process measures noise

import argparse
import functools
import time
from pathlib import Path

from benchmarks import (
    collectives,
    compiling,
    exchange,
    fisher,
    fits,
    memory,
    meshes,
    steps,
    targets,
)
from benchmarks.processes import HINT, torch_python
from benchmarks.tables import Options, Table, machine

TABLES = {
    "fits": fits.fits,
    "steps": steps.steps,
    "layers": steps.layers,
    "stalls": steps.stalls,
    "compile": compiling.compiling,
    "memory": memory.memory,
    "temporaries": memory.temporaries,
    "state": memory.state,
    "fisher": fisher.fisher,
    "exchange": exchange.exchange,
    "meshes": meshes.meshes,
    "collectives": collectives.collectives,
}
RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", help=f"any of {', '.join(TABLES)}; default all")
    parser.add_argument(
        "--torch-python",
        default=torch_python(),
        help="a Python with the PyTorch peers; default this one, if it has them",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that all runs; writes nothing"
    )
    of_targets = parser.add_argument_group("devices that are not here")
    of_targets.add_argument(
        "--target",
        nargs="+",
        default=[],
        help=f"{', '.join((*targets.CARDS, *targets.TOPOLOGIES))}, or another TPU topology, v5e:4x4",
    )
    of_targets.add_argument(
        "--size", nargs="+", default=["60m", "130m"], choices=targets.MODELS, help="of the Llama"
    )
    of_targets.add_argument("--methods", nargs="+", default=[], help="only these, as in the tables")
    of_targets.add_argument(
        "--programs",
        nargs="+",
        default=[targets.UPDATE, targets.STEP],
        choices=[targets.UPDATE, targets.STEP],
        help="only these",
    )
    of_targets.add_argument("--timeout", type=float, default=900, help="seconds a program may take")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if args.target:
        compile_for_targets(args)
        return
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown}; there is {', '.join(TABLES)}")
    if args.torch_python is None:
        print(HINT)
    options = Options(quick=args.quick, torch=args.torch_python)
    for name in args.tables or TABLES:
        start = time.perf_counter()
        table = TABLES[name](options)
        took = f"{time.perf_counter() - start:.0f} s"
        text = f"{TABLES[name].__doc__}\n\n{table}\n\n{machine()}."
        print(f"\n{name}, {took}\n\n{text}", flush=True)
        if not args.quick:
            save(name, text, table)


def compile_for_targets(args):
    """One table a target, as each takes a while; none of a target whose compiler is not installed."""
    sizes = ["quick"] if args.quick else args.size
    for target in args.target:
        if sentence := targets.missing(target):
            print(sentence)
            continue
        start = time.perf_counter()
        measured = functools.partial(targets.in_child, timeout=args.timeout)
        table = targets.targets(target, sizes, args.methods, measured, args.programs)
        took = f"{time.perf_counter() - start:.0f} s"
        text = f"{targets.targets.__doc__}\n\n{table}\n\n{targets.compilers(target)}."
        print(f"\n{target}, {took}\n\n{text}", flush=True)
        if not args.quick:
            save(f"target-{target.replace(':', '-')}", text, table)


def save(name: str, text: str, table: Table):
    (RESULTS / f"{name}.md").write_text(text + "\n")
    if table.figure:
        table.figure.savefig(RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
