"""Several optimizers on the same data and budget, each at the best learning rate of its own grid: a table and figures.

    python examples/compare.py galore adamw            # three rates around each default
    python examples/compare.py galore=0.01,0.02,0.04 adamw=1e-3,3e-3 --seeds 0 1 2 --steps 300
    python examples/compare.py 'fira=0.01 --rank 8' 'muon, 8 bits: muon=0.02 --state-bits 8' --baseline 'fira --rank 8'
    python examples/compare.py @examples/front.txt     # one argument a line

The optimizers come first, each with a title if that is to be another; options that `--help` does not list go to every
run of `pretrain_llama.py`, those behind an optimizer, in quotes, to its runs only. The rate is chosen by the validation
loss of the first seed; the other seeds run at that rate only. `front.png` sets the loss against the bytes of the state.

Every run is a folder of its own in `--out`: finished ones are not repeated and a stopped one continues, so the same
command picks up where Ctrl-C left off. The table is written after each run: first the first rate of every optimizer,
then the other rates, then the other seeds, of the optimizers on the front before those behind it.
"""

import os

# Threaded LAPACK beside any busy process is slower by orders of magnitude; read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pretrain_llama
from lib import runs
from lib.comparison import Entry, draw_curves, draw_front, front, table
from lib.llama import abstract_llama
from lib.optimizers import default_lr, is_matrix, make_optimizer
from lib.options import model_config, parse as parse_run

import optax_lowrank

Results = dict["Run", dict[str, Any]]


class Contender(NamedTuple):
    """An optimizer with options and rates of its own: `fira=0.01,0.02 --rank 8`."""

    name: str  # `fira --rank 8`, or its title
    optimizer: str
    options: tuple[str, ...]
    rates: tuple[float, ...]  # the likeliest first


class Run(NamedTuple):
    contender: Contender
    lr: float
    seed: int

    def argv(self, options: Sequence[str]) -> list[str]:
        """Of `pretrain_llama.py`; what the contender says comes after what all say."""
        own = [f"--optimizer={self.contender.optimizer}", f"--lr={self.lr}", f"--seed={self.seed}"]
        return [*options, *self.contender.options, *own]

    @property
    def folder(self) -> str:
        name = re.sub(r"[^\w.]+", "-", self.contender.name).strip("-")
        return f"{name}-lr{self.lr:g}-seed{self.seed}"


# ------------------------------------------------------------------------------------------------------- what to run


def parse_contender(text: str) -> Contender:
    """`galore=0.01,0.02` names its rates; `galore` takes its default, half and double of it. Options may follow."""
    title, colon, command = text.rpartition(": ")
    head, *options = command.split() or [""]
    optimizer, _, rates = head.partition("=")
    try:
        chosen = [float(rate) for rate in rates.split(",")] if rates else usual_rates(optimizer)
    except ValueError:
        chosen = []
    if not chosen or not re.fullmatch(r"\w[\w-]*", optimizer):
        raise SystemExit(
            f"{text}: write an optimizer as NAME or NAME=RATE,RATE,…, options behind it, and a title and a colon "
            "before it."
        )
    name = title if colon else " ".join([optimizer, *options])
    return Contender(name, optimizer, tuple(options), tuple(chosen))


def usual_rates(optimizer: str) -> list[float]:
    return [factor * default_lr(optimizer) for factor in (1, 0.5, 2)]


def schedule(contenders: Sequence[Contender], seeds: Sequence[int], done: Results) -> Iterator[Run]:
    """Every run, in the order in which a table of what is `done` soonest says most; best rates are looked up late."""
    for place in range(max(len(c.rates) for c in contenders)):
        for c in contenders:
            if place < len(c.rates):
                yield Run(c, c.rates[place], seeds[0])
    ahead = [entry.name for entry in front(entries_of(contenders, seeds, done))]
    for seed in seeds[1:]:
        for c in sorted(contenders, key=lambda c: c.name not in ahead):
            yield Run(c, entry_of(c, seeds, done).best_lr, seed)


def announce(run: Run, done: Results, total: int) -> None:
    """Which run this is, and the hours to go at the pace of those that are finished."""
    hours = "the first one tells how long they take"
    if done:
        pace = np.mean([result["wall_s"] for result in done.values()])
        hours = f"about {pace * (total - len(done)) / 3600:.1f} h to go, {pace:.0f} s a run"
    print(f"\nRun {len(done) + 1} of {total}, {run.folder}: {hours}", flush=True)


def carry_out(run: Run, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """The result of one run, continued or begun."""
    argv = [*run.argv(options), f"--out={out / run.folder}"]
    if (out / run.folder / "settings.json").exists():
        check_budget(argv)
        argv.append("--resume")
    if not pretrain_llama.main(argv)["finished"]:
        raise SystemExit("Stopped. The same command continues.")
    return read(run, out, options)


def read(run: Run, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """The result of a finished run."""
    folder = out / run.folder
    check_budget([*run.argv(options), f"--out={folder}"])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    curve = [(r["step"], r["valid_loss"]) for r in map(json.loads, lines) if "valid_loss" in r]
    share = matrix_share(tuple(Run(run.contender, run.contender.rates[0], 0).argv(options)))
    result = json.loads((folder / "result.json").read_text())
    return result | {"curve": curve, "matrix_share": share}


def check_budget(argv: Sequence[str]) -> None:
    """An error if the run that is there has other settings: what is compared has one schedule from end to end."""
    args = parse_run(argv)
    runs.refuse(args, runs.changes(args))


@functools.cache
def matrix_share(argv: tuple[str, ...]) -> float:
    """State of the matrices inside the layers, of AdamW's for them."""
    args = parse_run(argv)
    shapes = abstract_llama(model_config(args))[1]
    report = optax_lowrank.memory_report(make_optimizer(args), shapes)
    groups = [g for path, g in report.groups.items() if is_matrix(path)]
    return sum(g.arrays for g in groups) / sum(g.adamw for g in groups)


# ------------------------------------------------------------------------------------------------------ what came out


def entry_of(contender: Contender, seeds: Sequence[int], done: Results) -> Entry | None:
    """What is known of a contender; a run that diverged is worse than any other."""

    def score(lr: float) -> float:
        loss = grid[lr]["valid_loss"]
        return loss if math.isfinite(loss) else math.inf

    of = lambda lr, seed: done.get(Run(contender, lr, seed))
    grid = {lr: result for lr in sorted(contender.rates) if (result := of(lr, seeds[0]))}
    if not grid:
        return None
    best = min(grid, key=score)
    finished = {seed: result for seed in seeds if (result := of(best, seed))}
    return Entry(contender.name, contender.optimizer, grid, best, finished)


def entries_of(contenders: Sequence[Contender], seeds: Sequence[int], done: Results) -> list[Entry]:
    found = [entry_of(contender, seeds, done) for contender in contenders]
    return [entry for entry in found if entry]


# --------------------------------------------------------------------------------------------------------------- main


class LinesAsArguments(argparse.ArgumentParser):
    """Of a file `@FILE` each line is one argument; empty ones and `# …` are none."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return [arg_line] if arg_line.strip() and not arg_line.startswith("#") else []


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    about = (__doc__ or "").split("\n\n")[0]
    p = LinesAsArguments(description=about, allow_abbrev=False, fromfile_prefix_chars="@")
    p.add_argument("optimizers", nargs="+", metavar="'NAME[=RATE,…] [OPTION …]'")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--baseline", metavar="NAME", help="whose loss is subtracted, seed by seed")
    p.add_argument("--out", type=Path, default=Path("runs/compare"))
    args, options = p.parse_known_args(argv)
    names = [parse_contender(text).name for text in args.optimizers]
    if args.baseline and args.baseline not in names:
        p.error(f"--baseline {args.baseline}: not among {', '.join(names)}")
    return args, options


def main(argv: Sequence[str] | None = None) -> list[Entry]:
    args, options = parse(argv)
    contenders = [parse_contender(text) for text in args.optimizers]
    for contender in contenders:  # a wrong option ends this here, not hours later
        parse_run(Run(contender, contender.rates[0], args.seeds[0]).argv(options))
    total = sum(len(c.rates) for c in contenders) + (len(args.seeds) - 1) * len(contenders)
    every = [Run(c, lr, seed) for c in contenders for lr in c.rates for seed in args.seeds]
    finished = lambda run: (args.out / run.folder / "result.json").exists()
    done = {run: read(run, args.out, options) for run in every if finished(run)}

    def write() -> list[Entry]:
        entries = entries_of(contenders, args.seeds, done)
        (args.out / "table.md").write_text(table(entries, args.baseline) + "\n")
        draw_curves(entries, args.out / "figure.png")
        draw_front(entries, args.out / "front.png")
        return entries

    if done:
        write()
    for run in schedule(contenders, args.seeds, done):
        if run not in done:
            announce(run, done, total)
            done[run] = carry_out(run, args.out, options)
            write()
    entries = write()
    print(f"\n{table(entries, args.baseline)}\n\nSee table.md and the figures in {args.out}.")
    return entries


if __name__ == "__main__":
    main()
