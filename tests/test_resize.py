"""Other ranks between steps: what is cut, what goes on as if nothing had happened, what is released."""

import functools
import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowrank as ol

from .helpers import (
    OPTIMIZERS,
    assert_trees_close,
    assert_trees_equal,
    normal_tree,
    run,
)

SHAPES = {"kernel": (12, 20), "stack": (3, 12, 20), "bias": (20,)}
ADAPTIVE = ol.adaptive_rank(ol.svd(), max_residual_energy=1e-3, min_rank=1, rank_step=1)
CAP = {"rank": 8, "update_proj_gap": 4, "fit": ADAPTIVE}
FINEST = {"min_rank": 1, "rank_step": 1, "max_residual_energy": 1e-3}


def adaptive_core(inner, **options):
    core = ol.low_rank(
        inner, **{"rank": 8, "fit": ADAPTIVE, "refresh": ol.every(4), "axes": None, **options}
    )
    return ol.assemble(core, 0.01, rank=8)


def wrapped(make):
    """Inside of everything that has a state of its own."""
    tx = ol.inject_hyperparams(make)(learning_rate=0.01, **CAP)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(tx, 3), optax.scale(0.5))
    return optax.MultiSteps(tx, every_k_schedule=1)


# Each way in which arrays that depend on the rank are kept.
COMPOSITIONS = {
    "adarankgrad": ol.adarankgrad(0.01, **CAP, **FINEST, weight_decay=0.1),
    "fira_long_side": ol.fira(0.01, rotate_moments=True, side="long", **CAP),
    "natural_galore": ol.natural_galore(0.01, history=3, rotate_moments=True, **CAP),
    "natural_galore_int8": ol.natural_galore(0.01, history=3, history_dtype=jnp.int8, **CAP),
    "two_sided": adaptive_core(ol.scale_by_rotated_adam(), side="both"),
    "bases_in_codes": adaptive_core(optax.scale_by_adam(), basis_store=ol.InCodes(8)),
    "wrapped": wrapped(ol.galore),
    "partition": optax.partition(
        {"a": ol.galore(0.01, **CAP), "b": ol.fira(0.01, rotate_moments=True, **CAP)},
        {"kernel": "a", "stack": "b", "bias": "b"},
    ),
}
compositions = pytest.mark.parametrize("tx", COMPOSITIONS.values(), ids=COMPOSITIONS)


def parameters():
    random = np.random.default_rng(0)
    return {name: jnp.asarray(random.standard_normal(s), jnp.float32) for name, s in SHAPES.items()}


def low_rank_gradients(ranks):
    """One gradient a step, of these ranks, with singular values far from each other."""
    grads = []
    for step, rank in enumerate(ranks):
        random = np.random.default_rng(step)

        def matrices(shape, rank=rank, random=random):
            U = np.linalg.qr(random.standard_normal((*shape[:-1], rank)))[0]
            V = np.linalg.qr(random.standard_normal((*shape[:-2], shape[-1], rank)))[0]
            return (U * 0.7 ** np.arange(rank)) @ np.swapaxes(V, -1, -2)

        tree = {
            k: matrices(s) if len(s) > 1 else random.standard_normal(s) for k, s in SHAPES.items()
        }
        grads.append(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree))
    return grads


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def bases(state):
    """The width of every basis, by path; of two sides they must agree."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_basis := re.search(r"leaves/(\w+)/basis(/[PK])?(/codes|/block_scale)?$", name):
            assert found.setdefault(is_basis[1], x.shape[2]) == x.shape[2], name
    return found


def without_residuals(state):
    """A state without the norms of Fira's residuals: where the basis holds all of the gradient they are round-off."""
    is_fira = lambda x: hasattr(x, "norm") and hasattr(x, "moments")
    drop = lambda x: x._replace(norm=None) if is_fira(x) else x
    return jax.tree.map(drop, state, is_leaf=is_fira)


def live_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# What is cut


# APOLLO stores no basis; the moments of two-sided codes would begin as floats at rank 1, and stay codes.
RESIZED = [row for row in OPTIMIZERS if row not in ("apollo", "gradnormlorp_8bit")]


@pytest.mark.parametrize("row", RESIZED)
def test_every_optimizer_at_another_rank_has_the_state_it_would_have_begun_with(row):
    params = normal_tree("transformer", seed=0)
    tx, smaller = (OPTIMIZERS[row](learning_rate=0.01, rank=r) for r in (2, 1))
    state = ol.resize(tx, tx.init(params), params, 1)
    assert_trees_equal(state, smaller.init(params))
    assert_trees_equal(ol.resize(tx, state, params, 2), tx.init(params))


@compositions
def test_a_run_that_compacts_takes_the_same_steps(tx):
    """The rank falls from 7 to 2; what is cut off are zeros."""
    params, grads = parameters(), low_rank_gradients([7] * 4 + [2] * 7)
    want, want_state, _ = run(tx, params, grads)

    middle, state, _ = run(tx, params, grads[:7])
    small = ol.compact(tx, state, params, multiple_of=2)
    assert live_bytes(small) < live_bytes(state)
    assert ol.memory_report(tx, params, small).state == live_bytes(small)
    got, state, _ = run(tx, middle, grads[7:], small)
    # the same numbers, summed in another order
    assert_trees_close(got, want, 1e-5)
    assert set(bases(state).values()) == {2}
    want_state = ol.resize(tx, want_state, params, bases(state))
    assert_trees_close(*map(without_residuals, (state, want_state)), 1e-4)


@compositions
def test_wider_and_back_is_where_it_was(tx):
    params = parameters()
    params, state, _ = run(tx, params, low_rank_gradients(6 * [5]))
    wider = ol.resize(tx, state, params, 11)
    assert set(bases(wider).values()) == {11}
    assert_trees_equal(ol.resize(tx, wider, params, bases(state)), state)


@pytest.mark.parametrize("inner", [optax.scale_by_adam(), ol.scale_by_rotated_adam()])
def test_new_columns_are_empty_until_the_next_refit(inner):
    tx = ol.low_rank(inner, rank=3, fit=ol.svd(), refresh=ol.every(4))
    grads = [normal_tree("mlp", seed)["hidden"]["kernel"] for seed in range(6)]
    _, state, _ = run(tx, grads[0], grads[:2])
    _, same, want = run(tx, grads[0], grads[2:4], state)
    _, wider, got = run(tx, grads[0], grads[2:4], ol.resize(tx, state, grads[0], 5))
    assert_trees_close(got, want, 1e-6)
    assert ol.diagnostics(wider)[""].rank.tolist() == [3]
    _, wider, _ = run(tx, grads[0], grads[4:], wider)
    assert ol.diagnostics(wider)[""].rank.tolist() == [5]
    del same


def test_new_entries_are_what_init_puts_there():
    tx = ol.low_rank(optax.scale_by_rss(initial_accumulator_value=0.5), rank=2)
    params = {"kernel": jnp.ones((6, 8))}
    _, state, _ = run(tx, params, [params])
    wider = ol.resize(tx, state, params, 4).leaves["kernel"].rule.sum_of_squares
    np.testing.assert_array_equal(wider[:, :2], state.leaves["kernel"].rule.sum_of_squares)
    np.testing.assert_array_equal(wider[:, 2:], 0.5)


def test_ranks_by_path():
    """Leaves that are not named keep theirs; more than the matrix has is clipped; two sides share it."""
    tx, params = ol.gradnormlorp(0.01, rank=6), parameters()
    state = tx.init(params)
    assert bases(state) == {"kernel": 6, "stack": 6}
    assert bases(ol.resize(tx, state, params, {"stack": 4})) == {"kernel": 6, "stack": 4}
    assert set(bases(ol.resize(tx, state, params, 100)).values()) == {12}


# The number of codes crosses `min_size` both ways, and for two sides the number of blocks changes as well.
CODED = {
    "4_bits": ol.galore(0.01, rank=6, fit=ol.svd(), state_bits={"bits": 4, "min_size": 100}),
    "two_sided": ol.gradnormlorp(
        0.01, rank=6, fit=ol.svd(), state_bits={"bits": 8, "min_size": 30, "block_size": 4}
    ),
    "fira": ol.fira(0.01, rank=6, fit=ol.svd(), state_bits={"bits": 8, "min_size": 100}),
    "rotated": ol.galore(
        0.01, rank=6, rotate_moments=True, fit=ol.svd(), state_bits={"bits": 8, "min_size": 100}
    ),
    "natural_galore": ol.natural_galore(
        0.01, rank=6, fit=ol.svd(), history=2, state_bits={"bits": 8, "min_size": 100}
    ),
}


@pytest.mark.parametrize("tx", CODED.values(), ids=CODED)
def test_codes_stay_codes(tx):
    """And floats stay floats, whatever the rank makes of an array's size."""
    params = {"kernel": parameters()["kernel"]}
    grads = [{"kernel": grad["kernel"]} for grad in low_rank_gradients([12] * 3)]
    _, state, _ = run(tx, params, grads[:1])
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert jnp.uint8 in dtypes(state)
    for rank in (2, 10):
        other = ol.resize(tx, state, params, rank)
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert dtypes(other) == dtypes(state)
        assert shapes(ol.abstract_state(tx, params, other)) == shapes(other)
        _, after, updates = run(tx, params, grads[1:], other)
        assert shapes(after) == shapes(other)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, after)))
        again = ol.resize(tx, other, params, 6)
        assert shapes(again) == shapes(state)
    assert_trees_equal(again, state)


def test_floats_stay_floats():
    tx = ol.galore(0.01, rank=2, state_bits={"bits": 8, "min_size": 100})
    params = {"kernel": jnp.ones((12, 20))}
    wide = ol.resize(tx, tx.init(params), params, 9)
    rule = wide.direction.inner_states["matrix"].inner_state.leaves["kernel"].rule
    assert (rule.inner.mu.dtype, rule.inner.mu.shape) == (jnp.float32, (1, 9, 20))
    assert shapes(ol.abstract_state(tx, params, wide)) == shapes(wide)


def test_many_columns_of_two_sides_in_codes():
    """From 300 to 200 columns a row has one block where it had two."""
    tx = ol.gradnormlorp(0.01, rank=300, state_bits=8)
    params = {"kernel": jax.ShapeDtypeStruct((320, 400), jnp.float32)}
    state = ol.resize(tx, jax.eval_shape(tx.init, params), params, 200)
    leaf = state.direction.inner_states["matrix"].inner_state.leaves["kernel"]
    assert leaf.rule.inner.mu.shape == (1, 200, 200)
    assert leaf.rule.block_scale["mu"].shape == (1, 200, 1)


def test_columns_of_a_dct():
    tx, params = ol.galore(0.01, rank=4, fit=ol.dct()), {"kernel": jnp.eye(12, 20)}
    _, state, _ = run(tx, params, [params])
    basis = lambda state: state.direction.inner_states["matrix"].inner_state.leaves["kernel"].basis
    smaller = ol.resize(tx, state, params, 2)
    np.testing.assert_array_equal(basis(smaller), basis(state)[..., :2])
    _, after, _ = run(tx, params, [params], smaller)
    assert shapes(after) == shapes(smaller)
    larger = ol.resize(tx, state, params, 6)
    assert basis(larger)[..., 4:].tolist() == [[[-1, -1]]]
    assert ol.diagnostics(larger)["kernel"].rank.tolist() == [4]
    (_, _, want), (_, _, got) = (run(tx, params, [params], at) for at in (state, larger))
    assert_trees_close(got, want, 1e-6)


def test_two_sides_in_four_bits_take_even_ranks():
    """An odd row of codes has a byte each."""
    params = {"kernel": jax.ShapeDtypeStruct((12, 20), jnp.float32)}
    tx = ol.galore(0.01, rank=8, side="both", state_bits={"bits": 4, "min_size": 16})
    state = jax.eval_shape(tx.init, params)
    assert shapes(ol.resize(tx, state, params, 6))
    with pytest.raises(ValueError, match="Use an even rank, as pairs of 4-bit codes share a byte"):
        ol.resize(tx, state, params, 5)


def test_bases_that_are_not_stored_have_no_rank_to_change():
    tx, params = ol.galore(0.01, rank=4, fit=ol.seeded()), {"kernel": jnp.eye(12, 20)}
    with pytest.raises(ValueError, match="stores no basis"):
        ol.resize(tx, tx.init(params), params, 2)


def test_planning_needs_no_arrays():
    tx = ol.adarankgrad(0.01, rank=256)
    params = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    state = ol.resize(tx, jax.eval_shape(tx.init, params), params, 64)
    report = ol.memory_report(tx, params, state)
    assert report.arrays == 4 * (1024 * 64 + 2 * 4096 * 64 + 64)


# What `compact` keeps


def test_rank_is_the_largest_of_the_stack_rounded_up():
    tx, params = COMPOSITIONS["adarankgrad"], parameters()
    (grad,) = low_rank_gradients([3])
    grad["stack"] = grad["stack"].at[1].set(low_rank_gradients([5])[0]["stack"][1])
    _, state, _ = run(tx, params, [grad])
    assert ol.diagnostics(state)["stack"].rank.tolist() == [3, 5, 3]

    def compacted(**options):
        return bases(ol.compact(tx, state, params, **options))

    assert compacted(multiple_of=1) == {"kernel": 3, "stack": 5}
    assert compacted(multiple_of=2) == {"kernel": 4, "stack": 6}
    assert compacted(multiple_of=1, headroom=2) == {"kernel": 5, "stack": 7}
    assert compacted() == {"kernel": 8, "stack": 8}
    assert compacted(multiple_of=3, headroom=100) == {"kernel": 8, "stack": 8}


def test_nothing_to_release_returns_the_state_itself():
    params = parameters()
    for tx in (COMPOSITIONS["fira_long_side"], optax.adamw(0.01)):
        state = tx.init(params)  # no leaf has a basis yet
        assert ol.compact(tx, state, params) is state


def test_columns_behind_a_hole_are_kept():
    def fit(key, G, P):
        return ol.svd()(key, G, P) * jnp.array([[1, 0, 1, 0]])

    tx, params = ol.low_rank(optax.scale_by_adam(), rank=4, fit=fit), {"kernel": jnp.eye(6, 8)}
    _, state, _ = run(tx, params, [params])
    assert bases(ol.compact(tx, state, params, multiple_of=1)) == {"kernel": 3}


# What it costs


def test_one_trace_a_compaction_and_none_otherwise_over_a_thousand_steps():
    tx = ol.adarankgrad(0.01, **{**CAP, "update_proj_gap": 50}, **FINEST)
    grads = {rank: {"kernel": low_rank_gradients([rank])[0]["kernel"]} for rank in (6, 4, 2)}
    params = grads[2]
    traces = []

    @jax.jit
    def step(params, state, grad):
        traces.append(1)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state, widths = tx.init(params), []
    for count in range(1000):
        params, state = step(params, state, grads[6 if count < 400 else 4 if count < 700 else 2])
        if count % 100 == 99:
            state = ol.compact(tx, state, params, multiple_of=1)
            widths.append(bases(state)["kernel"])
    assert widths == [6, 6, 6, 6, 4, 4, 4, 2, 2, 2]
    assert len(traces) == 4


def test_live_bytes_fall_as_the_report_says():
    tx = ol.adarankgrad(0.01, rank=32, fit=ol.svd(), max_residual_energy=1e-3)
    params = {"kernel": jnp.outer(jnp.arange(256.0), jnp.arange(512.0))}
    _, state, _ = run(tx, params, [params])
    ol.compact(tx, state, params)  # compiles what it needs, constants included

    def live():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    before, report = live(), ol.memory_report(tx, params, state)
    state = ol.compact(tx, state, params)
    smaller = ol.memory_report(tx, params, state)
    assert before - live() == report.state - smaller.state
    assert smaller.arrays == report.arrays / 4


# Elsewhere


@pytest.mark.parametrize("name", ["adarankgrad", "two_sided", "wrapped"])
def test_checkpoint_of_a_compacted_state(name, tmp_path):
    """Saved at mixed ranks, restored by a manager that knows `tx` only, continued bit for bit."""
    tx = COMPOSITIONS[name]
    params, grads = parameters(), low_rank_gradients(12 * [3])
    params, state, _ = run(tx, params, grads[:5])
    state = ol.compact(tx, state, params, multiple_of=1)
    stack = {path: 2 for path in bases(state) if path.startswith("stack")}
    state = ol.resize(tx, state, params, stack)
    want, want_state, _ = run(tx, params, grads[5:], state)

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.StandardSave({"params": params, "opt_state": state}))
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        saved = manager.item_metadata(5)["opt_state"]
        target = {"params": params, "opt_state": ol.abstract_state(tx, params, saved)}
        restored = manager.restore(5, args=ocp.args.StandardRestore(target))
    assert_trees_equal(restored["opt_state"], state)
    got, got_state, _ = run(tx, restored["params"], grads[5:], restored["opt_state"])
    assert_trees_equal(got, want)
    assert_trees_equal(got_state, want_state)


def test_nnx_optimizer():
    model = nnx.Sequential(*(nnx.Linear(m, n, rngs=nnx.Rngs(0)) for m, n in ((12, 20), (20, 12))))
    tx = ol.adarankgrad(0.01, **CAP, **FINEST, weight_decay=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        grads = nnx.grad(lambda model: jnp.sum(jnp.square(model(jnp.ones((1, 12))))))(model)
        optimizer.update(model, grads)

    def resize(rank):
        optimizer.opt_state = ol.resize(tx, optimizer.opt_state, nnx.state(model, nnx.Param), rank)

    step(model, optimizer)
    before = optimizer.opt_state
    resize(3)
    small = ol.compact(tx, optimizer.opt_state, nnx.state(model, nnx.Param), multiple_of=1)
    assert ol.diagnostics(small)["layers/0/kernel"].rank.tolist() == [1]
    step(model, optimizer)
    step(model, optimizer)
    assert len(traces) == 2
    assert jax.tree.structure(optimizer.opt_state) == jax.tree.structure(before)


def test_shardings_stay():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    rows, columns = (
        NamedSharding(mesh, PartitionSpec(*spec))
        for spec in ((None, "model"), (None, None, "model"))
    )
    tx = ol.low_rank(optax.scale_by_adam(), rank=6, fit=ol.svd())
    params = {"kernel": jnp.ones((12, 20))}
    state = tx.init(params)

    put = lambda tree, sharding: jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
    leaf = state.leaves["kernel"]
    rule = leaf.rule._replace(mu=put(leaf.rule.mu, columns), nu=put(leaf.rule.nu, columns))
    leaf = leaf._replace(basis=put(leaf.basis, rows), rule=rule)
    state = state._replace(leaves={"kernel": leaf})
    for rank in (2, 9):
        other = ol.resize(tx, state, params, rank)
        assert other.leaves["kernel"].basis.shape == (1, 12, rank)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert old.sharding.is_equivalent_to(new.sharding, old.ndim)


# Mistakes


@pytest.mark.parametrize(
    ("rank", "error", "words"),
    [
        (0, ValueError, r"must be positive, got 0 for 'kernel'"),
        (2.5, TypeError, r"must be an int or a dict of ints by path, got 2.5"),
        ({"kernel": True}, TypeError, r"must be an int"),
        (
            {"bias": 2},
            ValueError,
            r"names 'bias', which has no basis. There are \['kernel', 'stack'\]",
        ),
    ],
)
def test_rank_that_is_none(rank, error, words):
    tx, params = COMPOSITIONS["fira_long_side"], parameters()
    with pytest.raises(error, match=words):
        ol.resize(tx, tx.init(params), params, rank)


@pytest.mark.parametrize("options", [{"headroom": -1}, {"multiple_of": 0}])
def test_compact_says_what_is_wrong(options):
    tx, params = COMPOSITIONS["fira_long_side"], parameters()
    with pytest.raises(ValueError, match=r"headroom >= 0 and multiple_of >= 1"):
        ol.compact(tx, tx.init(params), params, **options)


def test_optimizer_without_bases():
    params = parameters()
    with pytest.raises(ValueError, match="projects no leaf"):
        ol.resize(optax.adam(0.1), optax.adam(0.1).init(params), params, 4)


def test_state_of_another_optimizer():
    params = parameters()
    state = ol.galore(0.1, rank=8).init(params)
    with pytest.raises(ValueError, match=r"kernel/rule/mass' is missing.*belong together"):
        ol.resize(ol.adarankgrad(0.1, rank=8), state, params, 4)
    with pytest.raises(
        ValueError, match=r"kernel/basis' is \(1, 12, 8\), where `tx` has \(1, 16, 8\)"
    ):
        ol.abstract_state(ol.galore(0.1, rank=8), params | {"kernel": jnp.ones((16, 20))}, state)


@pytest.mark.parametrize("options", [{}, {"state_bits": {"bits": 8, "min_size": 1}}], ids=str)
def test_inside_schedule_free(options):
    """Its `init` copies the parameters; what it keeps of them stays as it is."""
    tx = ol.galore(0.01, rank=8, b1=0.0, **options)
    tx = optax.contrib.schedule_free(tx, 0.01, b1=0.9)
    params = {"kernel": jnp.ones((16, 24))}
    _, state = tx.update(params, tx.init(params), params)
    smaller = ol.resize(tx, state, params, 4)
    np.testing.assert_array_equal(smaller.z["kernel"], state.z["kernel"])
    assert set(bases(smaller).values()) == {4}
    tx.update(params, smaller, params)


def test_parameters_that_the_optimizer_inside_does_not_see():
    tx = optax.lookahead(ol.galore(0.01, rank=8), sync_period=5, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced({"kernel": jnp.ones((16, 24))})
    with pytest.raises(ValueError, match=r"no 'kernel'.*fast/kernel"):
        ol.resize(tx, tx.init(params), params, 4)


def test_array_that_has_no_axis_for_the_rank():
    """A flattened state has rows and columns in one axis: a shorter one would be other entries."""
    flat = optax.GradientTransformation(
        lambda R: jnp.zeros(R.size),
        lambda updates, state, params: (updates, state),
    )
    tx, params = ol.low_rank(flat, rank=4), {"kernel": jnp.ones((2, 6, 8))}
    with pytest.raises(
        ValueError, match=r"kernel: 'rule' goes from shape \(2, 32\) to \(2, 16\).*keeps the axes"
    ):
        ol.resize(tx, tx.init(params), params, 2)


def test_two_bases_of_one_leaf():
    """They share a path, and so a rank."""
    params = {"kernel": jnp.ones((6, 8))}
    part = functools.partial(ol.low_rank, optax.scale_by_adam(), fit=ol.svd())
    equal, different = (optax.chain(part(rank=4), part(rank=r)) for r in (4, 3))
    assert set(bases(ol.resize(equal, equal.init(params), params, 2)).values()) == {2}
    assert shapes(ol.abstract_state(different, params, different.init(params))) == shapes(
        different.init(params)
    )
    with pytest.raises(ValueError, match=r"'kernel' has two bases of different rank, 4 and 3"):
        ol.resize(different, different.init(params), params, 2)
