"""The plan: the numbers are those of `memory_report` and of shapes, the choice is the stated one."""

import jax
import jax.numpy as jnp
import pytest

import optax_lowrank as ol

BF16 = jnp.bfloat16
struct = lambda *shape: jax.ShapeDtypeStruct(shape, BF16)
STACKED = {
    "embed": {"embedding": struct(50, 64)},
    "layers": {"kernel": struct(4, 64, 128), "scale": struct(4, 64)},
}
APART = {
    "embed": {"embedding": struct(50, 64)},
    "layers": {i: {"kernel": struct(64, 128), "scale": struct(64)} for i in range(4)},
}
METHODS = {"galore": lambda rank, state_bits: ol.galore(1.0, rank=rank, state_bits=state_bits)}


@pytest.mark.parametrize("params", [STACKED, APART], ids=["stacked", "apart"])
def test_numbers(params):
    made = ol.plan(params, "1MB", methods=METHODS, ranks=(8, 16))
    embed, layer = 2 * 50 * 64, 2 * (64 * 128 + 64)
    for row in made.rows:
        tx = METHODS["galore"](row.rank, row.bits)
        assert row.state == ol.memory_report(tx, params).state
        assert row.parameters == embed + 4 * layer
        assert row.gradients == embed + (layer if row.layerwise else 4 * layer)
        b = 4 if params is STACKED and not row.layerwise else 1
        assert row.temporaries == 4 * 64 * 128 + b * (2 * 64 * 128 + 12 * row.rank * 128)
        assert row.total == row.parameters + row.state + row.gradients + row.temporaries
    assert [(r.rank, r.bits, r.layerwise) for r in made.rows] == [
        (rank, bits, way) for rank in (8, 16) for bits in (None, 8) for way in (False, True)
    ]


def test_heads_are_one_matrix():
    """(model, heads, size of a head) is the matrix that the optimizer projects."""
    made = ol.plan({"query": {"kernel": struct(64, 4, 32)}}, "1GB", methods=METHODS, ranks=(8, 0.5))
    sizes = {row.rank: row.temporaries for row in made.rows}
    at = lambda rank: 4 * 64 * 128 + 2 * 64 * 128 + 12 * rank * 128
    assert sizes == {8: at(8), 0.5: at(32)}


def test_best_is_the_largest_rank_and_then_the_simplest_way():
    everything = ol.plan(STACKED, 10**9, methods=METHODS, ranks=(8, 16))
    assert everything.best is everything.rows[4]  # rank 16, floats, whole
    assert ol.plan(STACKED, "1 KiB", methods=METHODS, ranks=(8,)).best is None
    sizes = [row.total for row in everything.rows]
    tight = ol.plan(STACKED, sizes[5], methods=METHODS, ranks=(8, 16))
    assert tight.best == everything.rows[5]  # rank 16, floats, layer-wise: just fits
    room = ol.plan(STACKED, sizes[5], methods=METHODS, ranks=(8, 16), activations=1)
    assert room.best != everything.rows[5]


def test_defaults_and_what_a_method_takes():
    made = ol.plan(STACKED, "24GB", ranks=(8,))
    assert {"adamw", "galore", "fira", "gradnormlorp"} <= {row.method for row in made.rows}
    assert {row.rank for row in made.rows if row.method == "adamw"} == {None}
    assert made.best.method == "adamw"  # where everything fits nothing has to be saved
    lines = str(made).splitlines()
    assert len(lines) == 1 + len(made.rows)
    assert sum("(best)" in line for line in lines) == 1


def test_without_layers_there_is_no_layerwise_step():
    made = ol.plan({"kernel": struct(64, 128)}, "1GB", methods=METHODS, ranks=(8,))
    assert not any(row.layerwise for row in made.rows)
    named = ol.plan({"h_0": struct(64, 128)}, "1GB", methods=METHODS, ranks=(8,), layers=r"h_(\d)")
    assert any(row.layerwise for row in named.rows)


def test_budget():
    assert ol.plan(STACKED, "24GB", methods={}).budget == 24 * 10**9
    assert ol.plan(STACKED, "1.5 GiB", methods={}).budget == 3 * 2**29
    assert ol.plan(STACKED, 1000, methods={}).budget == 1000
    with pytest.raises(ValueError, match=r'`budget` must be bytes or a text such as "24GB".*lots'):
        ol.plan(STACKED, "lots")
