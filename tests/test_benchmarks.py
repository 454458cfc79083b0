"""The benchmarks: every table can be measured, here on tiny shapes; how long anything took is not asked."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowrank as ol
from benchmarks.__main__ import TABLES
from benchmarks.exchange import averaged
from benchmarks.processes import HINT, peers, threads, torch_python, with_threads
from benchmarks.tables import Options
from benchmarks.timing import ratio, take_turns

from .helpers import compilation_cache

COLUMNS = {
    "fits": {"matrix", "threads", "fit", "ms", "faster than jnp.linalg.svd"},
    "steps": {"optimizer", "ms between refreshes", "by adamw", "ms with a refresh"},
    "layers": {"optimizer", "ms between refreshes", "by contrib.galore", "ms with a refresh"},
    "stalls": {"optimizer", "worst step by the median step", "steps"},
    "compile": {"layers", "how many", "optimizer", "s", "by adamw"},
    "memory": {"model", "optimizer", "state, MiB", "temporaries, MiB", "peak, MiB"},
    "temporaries": {"optimizer", "temporaries, MiB", "in largest matrices"},
    "state": {"optimizer", "bytes of arrays", "over 4 (m·r + 2·n·r)"},
    "fisher": {"history", "step, ms", "ratio"},
    "exchange": {"optimizer", "step, MiB", "refit of all, MiB", "of AdamW's"},
    "meshes": {"optimizer", "mesh", "arrays of the state that moved", "traces"},
    "collectives": {"target", "mesh", "layers", "step: collectives", "largest array"},
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Tables share programs. They empty JAX's caches, too, which would slow down the tests after these."""
    folder = tmp_path_factory.mktemp("compiled")
    with compilation_cache(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: None)
        yield


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_measured(name, tmp_path):
    table = TABLES[name](Options(quick=True, torch=torch_python()))
    assert set(table.header) >= COLUMNS[name]
    assert table.rows
    assert all(len(row) == len(table.header) and all(row) for row in table.rows)
    assert str(table).count("\n| ") == len(table.rows) + 1
    if table.figure:
        table.figure.savefig(tmp_path / "figure.png")


def test_refits_are_found_in_the_program_of_a_step():
    params = {"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32)}
    step, refit = averaged(ol.galore(1e-2, rank=4, axis_name="data"), params)
    assert step < 16 * 24 * 4 < refit


def test_the_state_of_galore_is_the_formula_to_the_byte():
    table = TABLES["state"](Options())
    column = table.header.index("over 4 (m·r + 2·n·r)")
    assert [row[column] for row in table.rows] == [
        "+0"
    ] * 12  # four sizes; of two sides and of contrib's


def test_turns_are_counted_and_end_with_the_budget():
    clock = iter(range(100))
    candidates = {"one": lambda: 1.0, "other": lambda: 2.0 * next(clock)}
    seconds = take_turns(candidates, repeats=3)
    assert seconds["one"].tolist() == [1, 1, 1]
    assert seconds["other"].tolist() == [2, 4, 6]  # the first call of each is not counted
    assert ratio(seconds["other"], seconds["one"]) == 4
    assert take_turns(candidates, repeats=3, budget=0)["one"].shape == (1,)


def test_a_process_gets_the_threads_it_is_given():
    before = threads()
    assert with_threads(1, threads) == 1
    assert threads() == before


@pytest.mark.skipif(torch_python() is not None, reason="has the PyTorch peers")
def test_without_pytorch_the_table_says_how_to_get_it_and_an_error_why_it_failed():
    table = TABLES["layers"](Options(quick=True))
    assert HINT in table.notes
    with pytest.raises(RuntimeError, match="torch"), peers(sys.executable, [(2, 3)], 1, ()):
        pass


@pytest.mark.skipif(torch_python() is None, reason="needs the PyTorch peers")
def test_pytorch_steps_the_same_gradients():
    shapes = [(8, 12), (12, 8)]
    with peers(torch_python(), shapes, 2, ("galore-torch", "fira", "apollo-torch")) as process:
        random = np.random.default_rng(0)
        for shape in shapes:
            last = random.standard_normal(shape, np.float32)
        assert process.checksum == pytest.approx(np.abs(last).sum(), rel=1e-6)
        for name in ("galore-torch", "fira", "apollo-torch"):
            assert process.call("refresh", name)() > 0
            assert process.call("step", name)() > 0
