"""What a run says while it goes: a bar on a terminal or in a notebook, lines elsewhere."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

import jax
from tqdm.auto import tqdm

from lib import devices
from lib.runs import Metrics

PATIENCE_S = 30  # longer than that nobody is left without a number
LINES = 10  # of a run without a bar, at least


def say(text: str) -> None:
    """A line, above the bar if there is one, of the first process only."""
    if devices.is_first():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    say("compiling …")
    start = time.perf_counter()
    yield
    say(f"compiled in {time.perf_counter() - start:.0f} s")


class Progress:
    """Losses since the last look at the device, which waits for it, and the bar or the lines."""

    def __init__(self, metrics: Metrics, args: argparse.Namespace, first: int):
        self.metrics, self.args = metrics, args
        self.losses: list[jax.Array] = []  # they stay on the device until the next look
        hide = None if devices.is_first() else True  # None: shown on a terminal only
        self.bar = tqdm(total=args.steps, initial=first, disable=hide)
        self.clock = self.said_at = time.perf_counter()
        self.said = first

    def overdue(self) -> bool:
        return time.perf_counter() - self.clock > PATIENCE_S

    def look(self, step: int, state_bytes: int) -> None:
        losses = jax.device_get(self.losses)
        seconds = (time.perf_counter() - self.clock) / len(losses)
        common = {"step_ms": 1e3 * seconds, "state_bytes": state_bytes}
        for at, value in enumerate(losses, step - len(losses) + 1):
            self.metrics.add(step=at, loss=float(value), **common)
        speed = f"{self.args.batch_size * self.args.seq_len / seconds:,.0f} tokens/s"
        now = f"loss {losses[-1]:.3f}, {speed}, {1e3 * seconds:.0f} ms"
        self.bar.set_postfix_str(now)
        self.bar.update(len(losses))
        if self.bar.disable and self.line_is_due(step):
            left = (self.args.steps - step) * seconds
            say(f"step {step:6d} of {self.args.steps}   {now} a step, {left:.0f} s to go")
            self.said, self.said_at = step, time.perf_counter()

    def line_is_due(self, step: int) -> bool:
        due = step - self.said >= self.args.steps / LINES or step == self.args.steps
        return due or time.perf_counter() - self.said_at > PATIENCE_S

    def go_on(self) -> None:
        self.losses, self.clock = [], time.perf_counter()
