"""Nothing is bound to a CPU: every update lowers for GPUs and TPUs, and what their compilers say is read rightly."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_lowrank as ol
from benchmarks import __main__ as command, targets
from benchmarks.memory import mib
from benchmarks.trees import step_of
from optax_lowrank import walls

from .helpers import OPTIMIZERS, PROBLEMS


def abstract(problem, dtype=jnp.bfloat16):
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
    return jax.tree.map(leaf, PROBLEMS[problem], is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_and_its_refits_lower_for_gpus_and_tpus(name):
    tx = OPTIMIZERS[name](learning_rate=1e-2)
    params = abstract("transformer")
    state = jax.eval_shape(tx.init, params)
    export = jax.export.export(jax.jit(step_of(tx)), platforms=("cuda", "tpu"))
    exported = export(params, state, params)
    assert exported.platforms == ("cuda", "tpu")
    assert exported.out_avals == exported.in_avals[: len(exported.out_avals)]


@pytest.mark.parametrize("options", [{}, {"state_bits": {"bits": 8, "min_size": 4}}], ids=str)
def test_what_waits_and_branches_on_tpus_is_as_elsewhere(monkeypatch, options):
    """Stacks of two widths, run on a CPU with what `walls` has for TPUs."""
    shapes = {"a": (3, 12, 20), "b": (3, 12, 20), "c": (3, 12, 28)}
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
    grads = [{x: draw(9 * i + ord(x), shape) for x, shape in shapes.items()} for i in range(3)]

    def run(oversample):  # another number, another program
        fit = ol.randomized_svd(oversample, power_iterations=2)
        tx = ol.fira(1.0, rank=4, update_proj_gap=2, fit=fit, **options)
        state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
        for g in grads:
            updates, state = update(g, state)
            out.append(updates)
        return out

    def tpu(*operands, tpu=None, default=None, **others):
        chosen.append(tpu is not None)
        return (tpu or default)(*operands)

    expected, chosen = run(oversample=8), []
    monkeypatch.setattr(walls, "lax", types.SimpleNamespace(**vars(lax)))
    monkeypatch.setattr(walls.lax, "platform_dependent", tpu)
    found = run(oversample=9)
    assert any(chosen)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=0.02 * np.abs(y).max())
    jax.tree.map(close, found, expected)


LEAF = (2, 32, 48)
PRODUCT = {
    "at once": lambda P, G: P @ G.astype(jnp.float32),
    "merged": lambda P, G: P[0] @ G.astype(jnp.float32).swapaxes(0, 1).reshape(32, 96),
    "in a loop": lambda P, G: jax.lax.fori_loop(0, 3, lambda _, x: P @ x, G.astype(jnp.float32)),
    "on some steps": lambda P, G: jax.lax.cond(
        P[0, 0, 0] > 0, lambda: (P @ G.astype(jnp.float32)).astype(G.dtype), lambda: G
    ),
    "a part": lambda P, G: P[:1] @ G[:1].astype(jnp.float32),
    "in bfloat16": lambda P, G: G * G + G,
}


@pytest.mark.parametrize(
    ("name", "found"), [(name, i < 3) for i, name in enumerate(PRODUCT)], ids=PRODUCT
)
def test_float32_arrays_of_a_leaf_are_found_outside_branches(name, found):
    arguments = (
        jax.ShapeDtypeStruct((2, 32, 32), jnp.float32),
        jax.ShapeDtypeStruct(LEAF, jnp.bfloat16),
    )
    compiled = jax.jit(lambda P, G: PRODUCT[name](P, G).astype(G.dtype)).lower(*arguments).compile()
    written = targets.full_size_float32(compiled, [LEAF])
    assert bool(written) == found, written
    assert not targets.full_size_float32(compiled, [(2, 31, 48)])


def test_the_table_says_what_is_compiled_what_does_not_fit_and_that_nothing_ran(monkeypatch):
    monkeypatch.setattr(targets, "devices", lambda target: jax.devices())
    galore = targets.Job("h100", "quick", targets.UPDATE, "galore")
    found = targets.measure(galore)
    assert found["peak"] > found["state"] > 0
    assert found["temporaries"] > 0
    measured = lambda job: found if job == galore else {"error": "does not fit"}
    table = targets.targets("h100", ["quick"], ["optax.adamw", "galore"], measured)
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]
    assert all(row["target"] == "h100, compiled, not run" for row in rows)
    assert [(row["program"], row["optimizer"], row["state, MiB"]) for row in rows] == [
        ("update and apply", "optax.adamw", "does not fit"),
        ("update and apply", "galore", mib(found["state"])),
        ("update and apply", "galore, 8 bits", "does not fit"),
        ("training step", "optax.adamw", "does not fit"),
        ("training step", "galore", "does not fit"),
        ("training step", "galore, 8 bits, layer-wise", "does not fit"),
    ]
    assert table.figure


@pytest.mark.parametrize("how", ["", ", layer-wise"])
def test_a_training_step_gives_back_what_it_takes(how):
    job = targets.Job("h100", "quick", targets.STEP, f"galore, 8 bits{how}")
    step, (params, state, tokens), _ = targets.program(job)
    assert jax.eval_shape(step, params, state, tokens) == (params, state)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_without_a_compiler_a_target_is_left_out_with_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--target", "h100", "v6e"])
    command.main()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["h100", "v6e"]
    assert "targets-cuda" in said[0]
    assert "targets-tpu" in said[1]
    assert not list(tmp_path.iterdir())
