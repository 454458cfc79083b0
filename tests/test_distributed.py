"""Several devices and processes: losses of one device, checkpoints that any number of processes continues."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pretrain_llama
import pytest
from jax.sharding import PartitionSpec as P
from lib import devices, options, text, training

from .helpers import compilation_cache

EXAMPLES = Path(pretrain_llama.__file__).parent
STEPS = 14
TINY = [
    *("--size=tiny", "--optimizer=galore", "--fit=svd"),  # those that compile soonest
    *("--batch-size=4", "--seq-len=16", f"--steps={STEPS}"),
    *("--eval-every=6", "--eval-batches=2", "--checkpoint-every=6", "--clip=0"),
    "--update-proj-gap=5",  # refits at steps 0, 5 and 10: on both sides of each stop
]
# Sums over devices are taken in another order, and a refit amplifies that.
TOLERANCE = 1e-4
TIMEOUT_S = 200  # of two processes, which take 15 where nothing else runs
UP = "layers/0/mlp/up_proj/kernel"
# A training process that gets a signal while it draws the batch of a step.
CHILD = """
import os, sys
import pretrain_llama
from lib import text

def draw_and_signal(tokens, seed, at, *shape):
    if at == step:
        os.kill(os.getpid(), number)
    return draw(tokens, seed, at, *shape)

step, number = map(int, sys.argv[1:3])
draw, text.Tokens.batch = text.Tokens.batch, draw_and_signal
pretrain_llama.main(sys.argv[3:])
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[None]:
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text(text.read_corpus()[:60_000], encoding="utf-8")
    return [*TINY, f"--corpus={corpus}"]


def losses(out: Path) -> dict[int, float]:
    """Of training by step, and under −step of validation."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    keys = {"loss": 1, "valid_loss": -1}
    return {sign * r["step"]: r[key] for r in records for key, sign in keys.items() if key in r}


@contextlib.contextmanager
def interrupted_after(step: int) -> Iterator[None]:
    """Ctrl-C while the batch of this step is drawn."""

    def draw_and_interrupt(tokens, seed, at, *shape):
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return draw(tokens, seed, at, *shape)

    draw = text.Tokens.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text.Tokens, "batch", draw_and_interrupt)
        yield


def assert_close(got: dict[int, float], want: dict[int, float]) -> None:
    assert got.keys() == want.keys()
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=TOLERANCE), step


# -------------------------------------------------------------------------------------------- several devices


def test_matrices_are_split_over_both_axes_and_their_state_with_them():
    args = options.parse(TINY)
    step = training.make_step(args, options.model_config(args))
    places = devices.places(step, devices.make_mesh({"data": 4, "model": 2}, rows=4))
    specs = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree.leaves_with_path(places.params)
    }
    by_columns, by_rows = P("data", "model"), P("model", "data")
    for part in ("attention/q_proj", "attention/k_proj", "mlp/up_proj", "mlp/gate_proj"):
        assert specs[f"layers/0/{part}/kernel"] == by_columns
    for part in ("attention/o_proj", "mlp/down_proj"):
        assert specs[f"layers/0/{part}/kernel"] == by_rows
    assert (specs["embed/embedding"], specs["lm_head/kernel"]) == (by_rows, by_columns)
    assert specs["norm/scale"] == P(None)
    up = matrix_state(places.opt_state)[UP]
    assert (up.basis.spec, up.rule.mu.spec) == (P(None, "data", None), P(None, None, "model"))


@pytest.mark.parametrize(
    ("mesh", "more"),
    [("model=2", ["--layerwise"]), ("data=4", ["--optimizer=adamw"])],
    ids=["layerwise", "adamw"],
)
def test_a_mesh_has_the_losses_of_one_device(mesh, more, arguments, tmp_path):
    curves = []
    for name, where in [("one", []), ("mesh", [f"--mesh={mesh}"])]:
        pretrain_llama.main([*arguments, *more, *where, f"--out={tmp_path / name}"])
        curves.append(losses(tmp_path / name))
    assert_close(curves[1], curves[0])


def test_compaction_leaves_the_state_where_it_lies():
    args = options.parse([*TINY, "--rank=24"])
    config = options.model_config(args)
    step = training.make_step(args, config)
    places = devices.places(step, devices.make_mesh({"data": 4, "model": 2}, rows=4))
    state = training.first_state(args, config, step, places)
    assert training.compacted(step, state, places) is state  # no matrix has a basis yet

    def use_six_columns(path, x):
        is_basis = "basis" in [getattr(key, "name", None) for key in path]
        return jax.device_put(x.at[..., :6].set(1.0), x.sharding) if is_basis else x

    used = jax.tree_util.tree_map_with_path(use_six_columns, state.opt_state)
    smaller = training.compacted(step, state._replace(opt_state=used), places).opt_state
    assert matrix_state(smaller)[UP].basis.shape == (1, 32, 12)  # and headroom, rounded up
    for x, sharding in zip(
        jax.tree.leaves(smaller), jax.tree.leaves(places.opt_state), strict=True
    ):
        assert x.sharding == sharding


def matrix_state(opt_state: Any) -> dict[str, Any]:
    return opt_state.direction.inner_states["matrix"].inner_state.leaves


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mesh=rows=2"], "'rows=2': write it as data=4,model=2"),
        (["--mesh=data=0"], "write it as"),
        (["--mesh=data=16"], "--mesh data=16,model=1 is 16 devices; JAX finds 8"),
        (["--mesh=data=8"], "data must divide the 4 rows"),
        (["--coordinator=localhost:1234"], "--coordinator, --num-processes and --process-id go"),
        (["--mesh=data=2", "--compile-only"], "--compile-only compiles for one device"),
    ],
)
def test_mistakes_are_explained(more, message, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        pretrain_llama.main([*arguments, *more, f"--out={tmp_path / 'run'}"])
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ several processes


class Ended(NamedTuple):
    """Exit codes and output of two processes."""

    codes: list[int]
    said: list[str]


def in_two_processes(
    out: Path, arguments: list[str], step: int = 0, number: signal.Signals = signal.SIGKILL
) -> Ended:
    """A run in two processes of two devices each; the second one gets a signal at `step`, if there is such a step.

    Where one dies, the other is killed, as a scheduler does.
    """
    environment = {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
        "JAX_PLATFORMS": "cpu",
    }
    with reserved_port() as port, contextlib.ExitStack() as stack:
        processes, logs = [], []
        for i in range(2):
            logs.append(out.with_name(f"{out.name}-{i}.log"))
            to = stack.enter_context(logs[i].open("w"))
            at = step if i == 1 else 0
            command = [sys.executable, "-c", CHILD, str(at), str(int(number)), *arguments]
            command += [f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--process-id={i}"]
            process = subprocess.Popen(
                [*command, f"--out={out}", "--mesh=data=2,model=2"],
                env=os.environ | environment,
                stdout=to,
                stderr=subprocess.STDOUT,
            )
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        wait_for_one_that_failed_or_all(processes)
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
    return Ended(codes, [log.read_text() for log in logs])


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given: it is bound here, and the coordinator may share it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def wait_for_one_that_failed_or_all(processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.1)


def upto(step: int, curve: dict[int, float]) -> dict[int, float]:
    return {at: loss for at, loss in curve.items() if abs(at) <= step}


@pytest.mark.timeout(600)  # on a machine that does much else
def test_a_run_goes_from_two_processes_to_one_and_back(arguments, tmp_path):
    """Begun by two, of which one is killed; continued by one and stopped there; finished by two."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    pretrain_llama.main([*arguments, f"--out={whole}"])
    one_device = losses(whole)

    killed = in_two_processes(out, arguments, 7, signal.SIGKILL)
    assert killed.codes[1] == -signal.SIGKILL, killed.said[1]
    assert_close(losses(out), upto(6, one_device))

    with interrupted_after(10):
        assert not pretrain_llama.main([*arguments, "--resume", f"--out={out}"])["finished"]
    assert_close(losses(out), upto(10, one_device))

    finished = in_two_processes(out, [*arguments, "--resume"])
    assert finished.codes == [0, 0], finished.said
    assert_close(losses(out), one_device)
    result = json.loads((out / "result.json").read_text())
    assert result["finished"]
    assert result["valid_loss"] == losses(out)[-STEPS]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    first, second = finished.said
    assert "validation loss" in first
    # Gloo says how many peers it has, sometimes on two lines
    assert [line for line in second.splitlines() if not re.search("Gloo|peer ranks", line)] == []


def test_processes_agree_on_a_stop_where_all_of_them_wait(monkeypatch):
    """A signal reaches the other one, which stops after the same step, and saves."""
    args = options.parse(TINY)
    assert training.due_after(args, 7, stop=True) == {"save", "stop"}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "in_any_process", lambda stop: True)
    assert training.due_after(args, 7, stop=True) == set()
    assert training.due_after(args, 10, stop=False) == {"look", "save", "stop"}
