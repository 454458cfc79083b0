"""Measure and write `benchmarks/results/<table>.md`: `python -m benchmarks [fits] [refresh] [steps] [fisher]`."""

import os

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # threaded LAPACK beside a busy process measures noise

import argparse
from pathlib import Path

from benchmarks import fisher, fits, steps, timing

TABLES = {
    "fits": fits.fits,
    "refresh": fits.refresh_steps,
    "steps": steps.llama_60m,
    "fisher": fisher.fisher,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", help=f"any of {', '.join(TABLES)}; default all")
    names = parser.parse_args().tables or list(TABLES)
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown}; there is {', '.join(TABLES)}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    for name in names:
        print(f"\n{name}, {timing.machine()}")
        table = TABLES[name]()
        print(table, flush=True)
        title = (TABLES[name].__doc__ or "").strip()
        note = "Medians of calls taken in turns, [smallest, largest]; ratios are medians over the turns."
        (results / f"{name}.md").write_text(f"{title}\n\n{table}\n\n{timing.machine()}. {note}\n")
