"""Reports: found inside every wrapper, and their bytes are those of the state."""

import functools
import html.parser
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_lowrank as ol
from optax_lowrank.report import Diagnostics, LeafDiagnostics

from .helpers import OPTIMIZERS, PROBLEMS, gradients, normal_tree, run

SVD = ol.svd()
galore = functools.partial(ol.galore, 0.1, rank=2, update_proj_gap=3, fit=SVD)
PROJECTED = {"hidden/kernel", "out/kernel"}


@functools.lru_cache
def plain_report():
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=5)
    _, state, _ = run(galore(), params, grads)
    return ol.diagnostics(state)


def test_diagnostics_of_a_run():
    """Five updates, refit at 0 and 3; the captured energy is that of the gradient at 3."""
    report, gradient = plain_report(), gradients("mlp", steps=5)[3]
    assert report.keys() == PROJECTED
    for name in ("hidden", "out"):
        leaf = report[f"{name}/kernel"]
        assert (leaf.rank.tolist(), leaf.skips.tolist()) == ([2], [0])
        assert leaf.steps_since_refresh.tolist() == [1]
        values = np.linalg.svd(gradient[name]["kernel"], compute_uv=False)
        share = np.square(values[:2]).sum() / np.square(values).sum()
        np.testing.assert_allclose(leaf.captured_energy, [share], rtol=1e-5)


WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e9), galore()),
    "partition": lambda: optax.partition(
        {"a": galore(), "b": galore()}, {"embed": "a", "hidden": "b", "out": "a"}
    ),
    "masked": lambda: optax.masked(galore(), {"embed": True, "hidden": True, "out": True}),
    "multi_steps": lambda: optax.MultiSteps(galore(), every_k_schedule=1),
    "apply_if_finite": lambda: optax.apply_if_finite(galore(), 3),
    "inject": lambda: ol.inject_hyperparams(ol.galore)(
        learning_rate=0.1, rank=2, update_proj_gap=3, fit=SVD
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_diagnostics_inside(wrapper):
    tx = WRAPPERS[wrapper]()
    _, state, _ = run(tx, normal_tree("mlp", seed=0), gradients("mlp", steps=5))
    report = ol.diagnostics(state)
    assert report.keys() == PROJECTED
    for path, want in plain_report().items():
        assert jax.tree.map(jnp.shape, report[path]) == jax.tree.map(jnp.shape, want)
        for got, value in zip(report[path], want, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5)


def test_diagnostics_of_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.hidden = nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    model = Model()
    optimizer = nnx.Optimizer(model, galore(), wrt=nnx.Param)
    (before,) = ol.diagnostics(optimizer.opt_state).values()
    assert (before.rank.tolist(), before.steps_since_refresh.tolist()) == ([0], [-1])
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, grads))
    for _ in range(2):
        step(model, optimizer)
    report = ol.diagnostics(optimizer.opt_state)
    assert list(report) == ["hidden/kernel"]
    assert report["hidden/kernel"].steps_since_refresh.tolist() == [1]
    # a matrix of ones has one direction, which holds all of it
    np.testing.assert_allclose(report["hidden/kernel"].captured_energy, [1], rtol=1e-5)


def test_diagnostics_of_two_sides_and_of_stacks():
    grad = {"stack": jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 9)), jnp.float32)}
    tx = ol.low_rank(optax.identity(), rank=4, fit=SVD, side="both")
    _, state = jax.jit(tx.update)(grad, tx.init(grad))
    assert ol.diagnostics(state)["stack"].rank.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("basis", "rank"), [(ol.dct(), 2), (ol.seeded(), -1)], ids=["dct", "seeded"]
)
def test_diagnostics_of_bases_that_are_not_stored(basis, rank):
    tx, grad = galore(fit=basis), {"kernel": jnp.eye(6, 9)}
    state = tx.init(grad)
    assert ol.diagnostics(state)["kernel"].rank.tolist() == [min(rank, 0)]
    _, state = jax.jit(tx.update)(grad, state)
    report = ol.diagnostics(state)["kernel"]
    assert (report.rank.tolist(), report.steps_since_refresh.tolist()) == ([rank], [0])


def test_diagnostics_of_states_without_bases():
    params = normal_tree("mlp", seed=0)
    assert ol.diagnostics(optax.adam(0.1).init(params)) == {}
    with pytest.warns(UserWarning, match="no leaf is projected"):
        assert ol.diagnostics(galore().init(normal_tree("no_matrix", seed=0))) == {}


def test_diagnostics_may_be_traced():
    state = galore().init(normal_tree("mlp", seed=0))
    report = jax.jit(ol.diagnostics)(state)
    assert report["out/kernel"].steps_since_refresh.tolist() == [-1]
    assert str(report) == str(ol.diagnostics(state))


def measured(rank, energy, age, skips):
    """Diagnostics of one leaf as they come from a device."""
    whole = lambda x: jnp.asarray(x, jnp.int32)
    return LeafDiagnostics(whole(rank), jnp.float32(energy), whole(age), whole(skips))


MEASURED = Diagnostics(
    {
        "layers/0/up": measured([4, 2], [0.5, 0.25], [7, 7], [1, 2]),
        "layers/0/down": measured([3], [1.0], [7], [0]),
        "layers/1/up": measured([4, 4], [0.0, 0.75], [-1, 9], [5, 0]),
        "seeded": measured([-1], [0.5], [2], [0]),
    }
)


def test_scalars():
    """Means of the matrices that have a basis, sums of skips; nothing where there is nothing to tell."""
    scalars = MEASURED.scalars("opt/")
    assert {type(x) for x in scalars.values()} == {float}
    of = lambda path: {
        name.rpartition("/")[2]: x for name, x in scalars.items() if name.startswith(f"opt/{path}/")
    }
    fields = LeafDiagnostics._fields
    assert of("layers/0/up") == dict(zip(fields, (3, 0.375, 7, 3), strict=True))
    assert of("layers/1/up") == dict(zip(fields, (4, 0.75, 9, 5), strict=True))
    assert of("seeded") == dict(zip(fields[1:], (0.5, 2, 0), strict=True))
    want = dict(zip(fields, (13 / 4, 3 / 5, 32 / 5, 8), strict=True))
    assert of("all") == pytest.approx(want)
    assert len(scalars) == 4 * 5 - 1


def test_scalars_before_the_first_step_and_of_a_bare_array():
    assert ol.diagnostics(galore().init(jnp.eye(6, 9))).scalars() == {"skips": 0, "all/skips": 0}
    assert Diagnostics().scalars() == {}


def test_table_of_diagnostics():
    assert (
        str(MEASURED)
        == """
leaf           matrices    rank  captured energy  steps since refresh  skips
layers/*/up           4  2 to 4   0.250 to 0.750               7 to 9      8
layers/0/down         1       3            1.000                    7      0
seeded                1       -            0.500                    2      0
""".strip()
    )


class Cells(html.parser.HTMLParser):
    """The cells of a table's markup, unescaped, line by line, with their alignment."""

    def __init__(self, markup):
        super().__init__()
        self.lines, self.sides = [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.lines.append([])
            self.sides.append([])
        if tag in ("th", "td"):
            self.lines[-1].append("")
            self.sides[-1].append(dict(attrs)["style"].removeprefix("text-align:"))

    def handle_data(self, data):
        if data.strip() and self.lines[-1]:
            self.lines[-1][-1] += data

    def handle_endtag(self, tag):
        if tag == "table":
            self.lines.append([])


STRANGE = {"<b>&": {"kernel": jnp.ones((8, 12))}, "layers": [{"kernel": jnp.ones((8, 12))}] * 2}


@pytest.mark.parametrize(
    "shown",
    [
        lambda: ol.memory_report(galore(), STRANGE),
        lambda: ol.describe(STRANGE),
        lambda: Diagnostics({"<b>&/kernel": MEASURED["seeded"]} | MEASURED),
        lambda: ol.plan(STRANGE, "1MB", methods={"<b>&": lambda rank: galore()}, ranks=(2,)),
    ],
    ids=["memory_report", "describe", "diagnostics", "plan"],
)
def test_notebooks_show_the_rows_of_the_text(shown):
    shown = shown()
    markup, text = shown._repr_html_(), str(shown).splitlines()
    cells = Cells(markup)
    assert len({len(line) for line in cells.lines if line}) == 1
    lines = [[cell for cell in line if cell] for line in cells.lines if line]
    assert lines == [re.split(" {2,}", line) for line in text][: len(lines)]
    assert text[len(lines) :] == re.findall("<p>(.*)</p>", markup)
    assert "<b>" not in markup
    assert any(line[0].startswith("<b>&") for line in lines)
    # numbers are flush right, in every line alike
    assert len(set(map(tuple, filter(None, cells.sides)))) == 1
    numbers = re.compile(r"[\d,.]+( %)?")
    for column, side in zip(
        zip(*filter(None, cells.lines), strict=True), cells.sides[0], strict=True
    ):
        if all(numbers.fullmatch(cell) for cell in filter(None, column[1:])) and any(column[1:]):
            assert side == "right"


# Bytes


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.filterwarnings("ignore:no leaf is projected")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "adamw", "sgd"])
def test_bytes_are_those_of_a_real_state(optimizer, problem):
    tx = {"adamw": optax.adamw, "sgd": optax.sgd}.get(optimizer) or OPTIMIZERS[optimizer]
    tx, params = tx(0.1), normal_tree(problem, seed=0)
    report, state = ol.memory_report(tx, params), tx.init(params)
    assert report.state == report.arrays + report.counters == nbytes(state)
    assert report.parameters == report.gradients == nbytes(params)
    assert report.adamw == 2 * nbytes(params)
    assert ol.memory_report(tx, params, state) == report
    assert ol.memory_report(tx, jax.eval_shape(lambda: params)) == report
    if optimizer == "adamw":
        assert (report.arrays, report.counters) == (report.adamw, 4)


def test_bytes_of_smaller_dtypes():
    params = normal_tree("mlp", seed=0, dtype=jnp.bfloat16)
    report = ol.memory_report(galore(mu_dtype=jnp.bfloat16), params)
    assert report.state == nbytes(galore(mu_dtype=jnp.bfloat16).init(params))
    assert report.parameters == nbytes(params)
    assert report.adamw == 2 * nbytes(params)


AWKWARD = ("mu", "nu", "matrix", "dense", "basis", "rule", "leaves", "stats", "count", "mu/w", "w")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_bits": {"bits": 8, "min_size": 1}, "b1": 0.8},
        {"accumulate": 2},
        {"side": "both"},
        {"fit": ol.seeded()},
    ],
    ids=["plain", "codes", "accumulated", "two_sided", "seeded"],
)
def test_bytes_go_to_the_leaf_that_they_belong_to(options):
    """Whatever leaves are called: each has what it has alone in its tree."""
    tx = galore(**options)
    shape = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((9,), jnp.float32)
    groups = ol.memory_report(tx, {name: shape for name in AWKWARD} | {"inner": bias}).groups
    (want,) = ol.memory_report(tx, {"kernel": shape}).groups.values()
    assert groups == {name: want for name in AWKWARD} | {"inner": groups["inner"]}
    assert groups["inner"].arrays >= 2 * (1 if "state_bits" in options else 4) * 9


def test_bytes_of_an_nnx_optimizer():
    model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    state = nnx.Optimizer(model, galore(), wrt=nnx.Param).opt_state
    params = nnx.state(model, nnx.Param)
    plain = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    assert (
        ol.memory_report(galore(), params, state).groups == ol.memory_report(galore(), plain).groups
    )


def test_layers_that_differ_in_a_number_are_one_group():
    layer = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    params = {"layers": {str(i): layer for i in range(3)}, "head": {"kernel": jnp.ones((8, 5))}}
    groups = ol.memory_report(galore(), params).groups
    assert groups.keys() == {"layers/*/kernel", "layers/*/bias", "head/kernel"}
    kernels = groups["layers/*/kernel"]
    assert (kernels.leaves, kernels.projected) == (3, True)
    assert kernels.parameters == 3 * 4 * 48
    assert kernels.arrays == 3 * 4 * (6 * 2 + 2 * 2 * 8)  # mr + 2nr floats
    assert kernels.adamw == 2 * kernels.parameters
    assert not groups["head/kernel"].projected
    assert groups["layers/*/bias"].arrays == 3 * 4 * 2 * 8


def test_leaves_that_differ_are_groups_of_their_own():
    """Else the bytes of one of them would be lost: of these layers the last is dense."""
    kernels = [jnp.ones((6, 8))] * 2 + [jnp.ones((8, 6)), jnp.ones((6, 8)), jnp.ones((6, 2))]
    params = {f"layers_{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    report = ol.memory_report(galore(), params)
    assert {name: (g.leaves, g.projected) for name, g in report.groups.items()} == {
        "layers_0/kernel … layers_3/kernel": (3, True),
        "layers_2/kernel": (1, True),
        "layers_4/kernel": (1, False),
    }
    assert report.parameters == nbytes(params)
    assert report.state == nbytes(galore().init(params))


def test_table():
    params = {"layers": [{"kernel": jnp.ones((8, 12))}] * 1000, "bias": jnp.ones(3)}
    report = ol.memory_report(galore(), jax.eval_shape(lambda: params))
    assert (
        str(report)
        == """
leaves                              count  parameters  optimizer state  AdamW's    ratio
bias                     dense          1          12               24       24  100.0 %
layers/*/kernel          projected  1,000     384,000          256,000  768,000   33.3 %
counters and statistics                                         26,012
total bytes                                   384,012          282,036  768,024   36.7 %
gradients                                     384,012
""".strip()
    )


def test_a_leaf_without_arrays_is_named():
    tx, params = ol.low_rank(optax.identity(), rank=2, fit=ol.seeded()), {"w": jnp.ones((6, 8))}
    with pytest.raises(ValueError, match="leaf 'w' keeps no arrays"):
        ol.diagnostics(tx.init(params))
