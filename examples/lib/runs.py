"""The folder of a run: its settings, metrics and checkpoints, and how a run stops so that it can be continued."""

import argparse
import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lib import devices
from lib.devices import Places
from lib.options import settings
from lib.steps import TrainState, Whole

RESULTS = ("metrics.jsonl", "result.json", "loss.png", "energy.png", "ranks.png")


# --------------------------------------------------------------------------------------------------- settings


def check_out(args: argparse.Namespace) -> None:
    """`--out` must hold the run that is to be continued, one that is to be overwritten, or none."""
    if not (args.out / "settings.json").exists():
        if args.resume:
            raise SystemExit(f"--resume: {args.out} holds no run. Leave --resume out to begin one.")
    elif args.resume:
        changed = changes(args)
        if "steps" in changed and args.steps > changed["steps"]:
            del changed["steps"]
            if devices.is_first():
                print(f"Longer: from here on the learning rate is that of {args.steps} steps.\n")
        refuse(args, changed)
    elif not args.overwrite:
        raise SystemExit(
            f"{args.out} holds a run: --resume continues it, --overwrite begins anew in its place, and another "
            "--out leaves it alone."
        )


def changes(args: argparse.Namespace) -> dict[str, Any]:
    """With what the run in `--out` began where the options say something else."""
    old, new = json.loads((args.out / "settings.json").read_text()), settings(args)
    return {k: old.get(k) for k in new if old.get(k) != new[k]}


def refuse(args: argparse.Namespace, changed: dict[str, Any]) -> None:
    if changed:
        said = [f"{k} was {old!r}, is {getattr(args, k)!r}" for k, old in changed.items()]
        raise SystemExit(f"{args.out} began with other settings: {'; '.join(said)}.")


def begin(args: argparse.Namespace) -> None:
    """Note the settings, and with `--overwrite` remove what the run before left."""
    if not devices.is_first():
        return
    if args.overwrite:
        shutil.rmtree(args.out / "checkpoints", ignore_errors=True)
    for name in RESULTS if args.overwrite else ("result.json",):  # of a finished run only
        (args.out / name).unlink(missing_ok=True)
    (args.out / "settings.json").write_text(json.dumps(settings(args), indent=2))


# ---------------------------------------------------------------------------------------------------- metrics


class Metrics:
    """`metrics.jsonl`: appended to as the run goes, cut back to the checkpoint on resume.

    All processes have the records, and the first one writes them.
    """

    def __init__(self, file: Path, step: int):
        lines = file.read_text().splitlines() if file.exists() else []
        self.records = [record for record in map(json.loads, lines) if record["step"] <= step]
        self.file = file
        self.start = time.perf_counter() - (self.records[-1]["elapsed_s"] if self.records else 0.0)
        if devices.is_first():
            # whole or not at all, whoever reads it or dies meanwhile
            new = file.with_suffix(".new")
            new.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            new.replace(file)

    def add(self, **record: Any) -> None:
        record["elapsed_s"] = time.perf_counter() - self.start
        self.records.append(record)
        if devices.is_first():
            with self.file.open("a") as out:
                out.write(json.dumps(record) + "\n")

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        chosen = [record for record in self.records if key in record]
        return [record["step"] for record in chosen], [record[key] for record in chosen]


# ------------------------------------------------------------------------------------- stopping and saving


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM makes non-empty: the step in flight ends first; twice interrupts."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        del frame
        caught.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not asynchronous: the next step reuses the buffers that would still be being written.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()  # named, so that a new manager can read metadata
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)


def restore(manager: ocp.CheckpointManager, step: Whole, places: Places | None) -> TrainState:
    """The last checkpoint, wherever it lay when it was written."""
    last = manager.latest_step()
    saved = manager.item_metadata(last)["opt_state"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kept = TrainState(places.params, places.opt_state) if places else here
    shapes = jax.tree.map(
        lambda sharding, of: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), of
        ),
        kept,
        TrainState(step.shapes, step.like(saved)),
    )
    return manager.restore(last, args=ocp.args.StandardRestore(shapes))
