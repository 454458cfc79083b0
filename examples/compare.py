"""Several optimizers on the same data and budget, each at the best learning rate of its own grid: a table and a figure.

    python examples/compare.py galore adamw            # three rates around each default
    python examples/compare.py galore=0.01,0.02,0.04 adamw=1e-3,3e-3 --seeds 0 1 2 --steps 300

The optimizers come first; options that `--help` does not list go to every run of `pretrain_llama.py`.
The rate is chosen by the validation loss of the first seed; the other seeds run at that rate only.
Every run is a folder of its own in `--out`: finished ones are not repeated and a stopped one continues,
so the same command picks up where Ctrl-C left off.
"""

import os

# Threaded LAPACK beside any busy process is slower by orders of magnitude; read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import pretrain_llama


class Entry(NamedTuple):
    """One optimizer: every rate with the first seed, and the best rate with all seeds."""

    optimizer: str
    grid: dict[float, dict[str, Any]]
    best_lr: float
    seeds: list[dict[str, Any]]


def parse_optimizer(text: str) -> tuple[str, list[float]]:
    """`galore=0.01,0.02` names its rates; `galore` takes its default, half and double of it."""
    name, _, rates = text.partition("=")
    if not rates:
        return name, [factor * pretrain_llama.default_lr(name) for factor in (0.5, 1, 2)]
    try:
        return name, [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise SystemExit(f"{text}: write an optimizer as NAME or NAME=RATE,RATE,…") from None


def run(out: Path, optimizer: str, lr: float, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """The result of one run: read, continued or begun."""
    folder = out / f"{optimizer}-lr{lr:g}-seed{seed}"
    argv = [*options, f"--optimizer={optimizer}", f"--lr={lr}", f"--seed={seed}", f"--out={folder}"]
    if (folder / "settings.json").exists():
        argv.append("--resume")
    if (folder / "result.json").exists():
        pretrain_llama.check_out(pretrain_llama.parse(argv))  # an error if it was another budget
        result = json.loads((folder / "result.json").read_text())
    else:
        result = pretrain_llama.main(argv)
    if not result["finished"]:
        raise SystemExit("Stopped. The same command continues.")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    curve = [(r["step"], r["valid_loss"]) for r in map(json.loads, lines) if "valid_loss" in r]
    return result | {"curve": curve}


def score(result: dict[str, Any]) -> float:
    """Validation loss; a run that diverged is worse than any other."""
    return result["valid_loss"] if math.isfinite(result["valid_loss"]) else math.inf


def search(out: Path, text: str, seeds: Sequence[int], options: Sequence[str]) -> Entry:
    optimizer, rates = parse_optimizer(text)
    grid = {lr: run(out, optimizer, lr, seeds[0], options) for lr in sorted(rates)}
    best = min(grid, key=lambda lr: score(grid[lr]))
    others = [run(out, optimizer, best, seed, options) for seed in seeds[1:]]
    return Entry(optimizer, grid, best, [grid[best], *others])


def table(entries: Sequence[Entry]) -> str:
    """Markdown; a rate at the end of its grid is marked, for a better one may lie beyond."""
    lines = [
        "| optimizer | learning rate | validation loss | state, bytes | of AdamW | ms/step |",
        "|---|---|---|---|---|---|",
    ]
    for e in entries:
        losses = [result["valid_loss"] for result in e.seeds]
        spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        edge = "*" if len(e.grid) > 1 and e.best_lr in (min(e.grid), max(e.grid)) else ""
        state, adamw = e.seeds[0]["state_bytes"], e.seeds[0]["adamw_bytes"]
        ms = np.mean([result["step_ms"] for result in e.seeds])
        lines.append(
            f"| {e.optimizer} | {e.best_lr:g}{edge} | {np.mean(losses):.4f}{spread} "
            f"| {state:,} | {state / adamw:.0%} | {ms:.0f} |"
        )
    if any("*" in line for line in lines):
        lines.append("\n\\* the best of its grid is its end: a better rate may lie beyond.")
    return "\n".join(lines)


def figure(entries: Sequence[Entry], file: Path) -> None:
    """Validation loss over steps (best rate, mean over seeds), and at the end over the grid."""
    fig = matplotlib.figure.Figure(figsize=(11, 4), layout="constrained")
    curves, rates = fig.subplots(1, 2)
    for e in entries:
        # without the loss before the first step, which would flatten all the others
        steps, loss = np.mean([result["curve"][1:] for result in e.seeds], axis=0).T
        curves.plot(steps, loss, marker="o", markersize=3, label=e.optimizer)
        final = [result["valid_loss"] for result in e.grid.values()]
        rates.plot(list(e.grid), final, marker="o", markersize=3, label=e.optimizer)
    curves.set(xlabel="step", ylabel="validation loss (nats per token)", title="best learning rate")
    rates.set(xlabel="learning rate", xscale="log", title="at the end, first seed")
    ticks = sorted({lr for e in entries for lr in e.grid})
    rates.set_xticks(ticks, [f"{lr:g}" for lr in ticks], rotation=45)
    rates.minorticks_off()
    for axes in (curves, rates):
        axes.grid(alpha=0.3)
        axes.legend()
    fig.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> list[Entry]:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("optimizers", nargs="+", metavar="NAME[=RATE,…]")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--out", type=Path, default=Path("runs/compare"))
    args, options = p.parse_known_args(argv)
    entries = [search(args.out, text, args.seeds, options) for text in args.optimizers]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table(entries) + "\n")
    figure(entries, args.out / "figure.png")
    print(f"\n{table(entries)}\n\nSee {args.out / 'table.md'} and {args.out / 'figure.png'}.")
    return entries


if __name__ == "__main__":
    main()
