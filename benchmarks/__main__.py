"""Measure side by side with peers and write `benchmarks/results/`: `python -m benchmarks [TABLE …]`."""

import os

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # threaded LAPACK beside a busy process measures noise

import argparse
import time
from pathlib import Path

from benchmarks import compiling, fisher, fits, memory, steps
from benchmarks.processes import HINT, torch_python
from benchmarks.tables import Options, machine

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
}


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
    args = parser.parse_args()
    unknown = [name for name in args.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown}; there is {', '.join(TABLES)}")
    if args.torch_python is None:
        print(HINT)
    options = Options(quick=args.quick, torch=args.torch_python)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    for name in args.tables or TABLES:
        start = time.perf_counter()
        table = TABLES[name](options)
        took = f"{time.perf_counter() - start:.0f} s"
        text = f"{TABLES[name].__doc__}\n\n{table}\n\n{machine()}."
        print(f"\n{name}, {took}\n\n{text}", flush=True)
        if not args.quick:
            (results / f"{name}.md").write_text(text + "\n")
            if table.figure:
                table.figure.savefig(results / f"{name}.png")


if __name__ == "__main__":
    main()
