"""Other processes: with a given number of threads, with settings of their own, and the PyTorch peers."""

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
HINT = (
    "PyTorch peers left out: give a Python that can import them with `--torch-python`, made by "
    "`python -m venv peers && peers/bin/pip install torch galore-torch fira apollo-torch`."
)


def threads() -> int:
    """How many threads JAX computes with here, and so everybody: XLA makes one for each core it may run on."""
    return len(os.sched_getaffinity(0))


def with_threads(count: int, call: Callable, *args):
    """`call(*args)` in a fresh process that may run on `count` cores, as neither XLA nor LAPACK change their minds."""
    cores, context = os.sched_getaffinity(0), multiprocessing.get_context("spawn")
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        with (
            unittest.mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS=str(count)),
            concurrent.futures.ProcessPoolExecutor(1, context) as pool,
        ):
            return pool.submit(call, *args).result()
    finally:
        os.sched_setaffinity(0, cores)


def eight_devices() -> dict[str, str]:
    """The environment of a process that has eight CPU devices."""
    # machine code that is not optimized takes a fourth of the time to compile
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
        # later ones end the process at flags that they do not know
        flags += " --xla_cpu_use_fusion_emitters=false"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "OPENBLAS_NUM_THREADS": "1"}


def in_child(module: str, job: Mapping, environment: Mapping[str, str], timeout: float = 900):
    """What `python -m MODULE JOB` prints last, or {"error": a sentence}; `job` and the answer are JSON."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(job)],
            cwd=ROOT,
            env=os.environ | environment,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {timeout:.0f} s"}
    if done.returncode:  # one program that fails leaves the others their rows
        print(done.stderr, file=sys.stderr)
        return {"error": f"failed: {(done.stderr.splitlines() or ['no message'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


class Peers:
    """A running `benchmarks.peers`. Its calls return the seconds they took over there."""

    def __init__(self, process: subprocess.Popen, errors: IO[str], job: dict):
        self.process, self.errors = process, errors
        self.checksum = self._ask(job)

    def call(self, name: str, argument) -> Callable[[], float]:
        """The call `name` of `benchmarks.peers`, to be taken turns with."""
        return functools.partial(self._ask, [name, argument])

    def _ask(self, message) -> float:
        with contextlib.suppress(BrokenPipeError):  # it ended: the answer is empty
            print(json.dumps(message), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise RuntimeError(f"the PyTorch process ended:\n{self.errors.read()}")
        return float(answer)


@contextlib.contextmanager
def peers(
    python: str | None,
    shapes: Iterable[tuple[int, int]],
    rank: int,
    optimizers: Iterable[str],
    gradients: str = "normal",
) -> Iterator[Peers | None]:
    """Starts `benchmarks.peers` under `python`; None where there is none."""
    if python is None:
        yield None
        return
    job = {"threads": threads(), "rank": rank, "gradients": gradients}
    job |= {"shapes": list(shapes), "optimizers": list(optimizers)}
    command = [python, "-W", "ignore", "-m", "benchmarks.peers"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, cwd=ROOT, stderr=errors, **pipes) as process,
    ):
        try:
            yield Peers(process, errors, job)
        finally:
            process.terminate()


def torch_python() -> str | None:
    """This interpreter, if it has the peers."""
    found = all(
        importlib.util.find_spec(n) for n in ("torch", "galore_torch", "fira", "apollo_torch")
    )
    return sys.executable if found else None
