"""What Optax, Flax and Orbax expect of an optimizer: the rows of `helpers.OPTIMIZERS`."""

import functools

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_lowrank as ol

from .helpers import (
    OPTIMIZERS,
    PROBLEMS,
    assert_trees_close,
    assert_trees_equal,
    gradients,
    normal_tree,
    run,
)


# In module scope pytest runs all tests of one row together, on programs that are compiled once.
@pytest.fixture(scope="module", params=OPTIMIZERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def factory(name):
    return OPTIMIZERS[name]


@pytest.fixture(scope="module")
def tx(name):
    return made(name)


@functools.cache  # a fixture is made anew for a test of a few rows, and its programs compiled again
def made(name):
    return OPTIMIZERS[name](learning_rate=1e-2)


def rows(*names):
    return pytest.mark.parametrize("name", names, indirect=True)


# Wrappers, and what an optimizer has no part in: one that weighs columns, one with a ring buffer that counts, one that
# reads weights, projects two sides and keeps arrays of every dtype.
three_rows = rows("fira", "natural_galore", "gradnormlorp_8bit")


@pytest.fixture(scope="module")
def coded(name):
    return name.endswith("8bit")


@pytest.fixture(scope="module")
def rounding(coded):
    """How far two programs for the same step may be apart, relative to the largest entry.

    They round differently, and Adam divides each coordinate by its own size, which makes a rounding error in a small
    one visible; a number between two codes becomes either. A mistake shows at the size of the step itself.
    """
    return 0.1 if coded else 5e-3


def starts(tx, params):
    """The state before the first step; a tree without matrices is told of."""
    if params.keys() == PROBLEMS["no_matrix"].keys():
        with pytest.warns(UserWarning, match="no leaf is projected"):
            return tx.init(params)
    return tx.init(params)


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


# The transformation itself


@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_trace_for_many_steps_with_unknown_extra_args(tx, problem):
    """A step makes a state of the types that it takes, which is all that a second one is traced for."""
    params, (grad,) = normal_tree(problem, seed=0), gradients(problem, steps=1)
    state = starts(tx, params)
    update = functools.partial(tx.update, value=jnp.float32(1), unknown=None)
    updates, new = jax.eval_shape(update, grad, state, params)
    assert types(new) == types(state)
    assert shapes(updates) == shapes(params)


@three_rows
def test_a_tree_without_matrices(tx):
    params, grads = normal_tree("no_matrix", seed=0), gradients("no_matrix", steps=2)
    moved, state, _ = run(tx, params, grads, starts(tx, params))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((moved, state)))
    assert all(
        bool(jnp.all(x != y)) for x, y in zip(*map(jax.tree.leaves, (moved, params)), strict=True)
    )


def test_converges(factory):
    """A quadratic of full rank: the subspace must move for its minimum to be reached."""
    params, target = normal_tree("transformer", seed=0), normal_tree("transformer", seed=1)
    tx = factory(learning_rate=optax.cosine_decay_schedule(0.3, 1000), update_proj_gap=20)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params_end, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=1000))(
        (params, tx.init(params))
    )
    assert loss(params_end) < 1e-6 * loss(params)


def hidden(tree):
    """One layer: what is not compiled as a whole is compiled operation by operation."""
    return {"hidden": tree["hidden"]}


@three_rows
def test_jit_changes_nothing(tx, rounding):
    params, grads = hidden(normal_tree("mlp", 0)), list(map(hidden, gradients("mlp", steps=2)))
    _, want_state, want = run(tx, params, grads)
    state, got = tx.init(params), []
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        got.append(updates)
    assert_trees_close(got, want, rounding)
    assert_trees_close(state, want_state, rounding)


def test_dtypes_survive(tx, coded):
    """Updates come in each parameter's dtype, the state keeps its own: moments float32 by default, or codes."""
    dtypes = (jnp.float16, jnp.bfloat16, jnp.float32)
    params = {jnp.dtype(d).name: normal_tree("mlp", seed=0, dtype=d)["hidden"] for d in dtypes}
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert types(updates) == types(params)
    assert types(after) == types(state)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state)}
    kinds = {kind.name for kind in kinds if jnp.issubdtype(kind, jnp.floating)}
    assert kinds == ({"float32", "bfloat16"} if coded else {"float32"})


def test_strict_modes(tx):
    """No NaN on the way, no tracer kept, nothing fetched from or sent to the host in a step."""
    params, grads = hidden(normal_tree("mlp", 0)), list(map(hidden, gradients("mlp", steps=2)))
    state = tx.init(params)
    with jax.checking_leaks():
        jax.eval_shape(tx.update, grads[0], state, params)
    run(tx, params, grads, state)  # compiles, and brings constants to the device
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        run(tx, params, grads, state)


@rows("gradnormlorp")
def test_disabled_jit_changes_nothing(tx, rounding):
    params, grads = hidden(normal_tree("mlp", 0)), list(map(hidden, gradients("mlp", steps=1)))
    _, _, want = run(tx, params, grads)
    with jax.disable_jit():
        updates, _ = tx.update(grads[0], tx.init(params), params)
    assert_trees_close([updates], want, rounding)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_x64(tx, coded, dtype):
    """Where JAX has 64 bits, counts stay int32, and moments are float64 if the parameters are."""
    with jax.enable_x64(True):
        params, grad = hidden(normal_tree("mlp", 0, dtype)), hidden(normal_tree("mlp", 1, dtype))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, grad, state, params)
    assert shapes(updates) == shapes(params)
    assert shapes(after) == shapes(state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(after)}
    assert "int64" not in kinds
    assert ("float64" in kinds) == (dtype == jnp.float64 and not coded)


def test_init_needs_only_shapes(tx):
    params = normal_tree("transformer", seed=0)
    state = tx.init(params)
    abstract_params = jax.eval_shape(lambda: params)
    assert_trees_equal(tx.init(abstract_params), state)
    assert shapes(jax.eval_shape(tx.init, params)) == shapes(state)


def test_state_holds_distinct_nonempty_arrays(tx):
    """No empty arrays (Orbax refuses them) and no buffer twice (donation refuses it)."""
    _, state, _ = run(tx, params := normal_tree("mlp", seed=0), gradients("mlp", steps=1))
    for tree in (tx.init(params), state):
        leaves = jax.tree.leaves((params, tree))
        assert all(isinstance(leaf, jax.Array) and leaf.size > 0 for leaf in leaves)
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_donation(tx):
    step = jax.jit(
        lambda grad, state, params: tx.update(grad, state, params), donate_argnums=(0, 1)
    )
    params = normal_tree("mlp", seed=0)
    state, old = tx.init(params), []
    for grad in gradients("mlp", steps=4):
        old += jax.tree.leaves(state)
        _, state = step(grad, state, params)
    # what a step does not read it cannot take: whether the last one was finite
    assert {leaf.dtype for leaf in old if not leaf.is_deleted()} == {jnp.dtype(bool)}


@three_rows
def test_absent_leaves(tx):
    """A parameter may be `None`, as with `nnx.split` or `eqx.partition`."""
    params, (grad,) = normal_tree("mlp", seed=0), gradients("mlp", steps=1)
    params["hidden"]["bias"] = grad["hidden"]["bias"] = None
    _, _, (updates,) = run(tx, params, [grad])
    assert updates["hidden"]["bias"] is None
    assert shapes(updates) == shapes(params)


# Inside Optax's wrappers


@three_rows
def test_schedule_equals_its_constant(tx, factory, rounding):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    _, _, constant = run(tx, params, grads)
    _, _, scheduled = run(factory(learning_rate=optax.constant_schedule(1e-2)), params, grads)
    assert_trees_close(scheduled, constant, rounding)


@three_rows
def test_inject_hyperparams(tx, factory, rounding):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    injected = ol.inject_hyperparams(factory)(learning_rate=1e-2)
    _, want_state, want = run(tx, params, grads)
    _, state, got = run(injected, params, grads)
    assert_trees_close(got, want, rounding)
    assert_trees_close(state.inner_state, want_state, rounding)

    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0)
    _, _, (still,) = run(injected, params, grads[:1], state)
    assert optax.tree.norm(still) == 0


@three_rows
def test_multi_steps(tx, rounding):
    """Two micro-batches are one step on their mean, and only that step counts towards a refit."""
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=8)
    pairs = zip(grads[::2], grads[1::2], strict=True)
    means = [optax.tree.scale(0.5, optax.tree.add(*pair)) for pair in pairs]
    _, state, got = run(optax.MultiSteps(tx, every_k_schedule=2), params, grads)
    _, want_state, want = run(tx, params, means)
    assert all(optax.tree.norm(updates) == 0 for updates in got[::2])
    assert_trees_close(got[1::2], want, rounding)
    assert_trees_close(state.inner_opt_state, want_state, rounding)


@three_rows
def test_masked_passes_other_leaves_through(tx, rounding):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    mask = {"embed": True, "hidden": True, "out": False}
    _, _, got = run(optax.masked(tx, mask), params, grads)

    def chosen(tree):
        return {name: tree[name] for name in mask if mask[name]}

    _, _, want = run(tx, chosen(params), [chosen(grad) for grad in grads])
    assert_trees_close([chosen(updates) for updates in got], want, rounding)
    assert_trees_equal([updates["out"] for updates in got], [grad["out"] for grad in grads])


@three_rows
def test_partition_equals_separate_optimizers(tx, rounding):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    labels = {"embed": "sgd", "hidden": "low_rank", "out": "sgd"}
    both = optax.partition({"low_rank": tx, "sgd": optax.sgd(0.1)}, labels)
    _, _, got = run(both, params, grads)
    _, _, want = run(tx, hidden(params), [hidden(grad) for grad in grads])
    assert_trees_close([hidden(updates) for updates in got], want, rounding)


@three_rows
def test_apply_if_finite(tx, rounding):
    """The wrapper leaves out a step with a NaN; the following steps are as if it had not been."""
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=5)
    bad = optax.tree.full_like(grads[0], jnp.nan)
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    _, state, got = run(guarded, params, [*grads[:3], bad, *grads[3:]])
    _, want_state, want = run(tx, params, grads)
    assert optax.tree.norm(got.pop(3)) == 0
    assert_trees_close(got, want, rounding)
    assert_trees_close(state.inner_state, want_state, rounding)


def test_extra_args_reach_the_chain_of_an_accumulating_optimizer():
    """The loss has stopped to fall: after two more steps all updates are halved."""
    tx = ol.galore(0.01, rank=2, accumulate=2, fit=ol.svd())
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    _, _, plain = run(tx, params, grads)
    chained = optax.chain(tx, plateau)
    state, step, got = chained.init(params), jax.jit(chained.update), []
    for grad in grads:
        updates, state = step(grad, state, params, value=jnp.float32(1), unknown=None)
        got.append(updates)
    norms = [float(optax.tree.norm(updates)) for updates in got]
    assert norms[0] == norms[2] == 0
    assert_trees_close(got[1], plain[1], 2e-3)
    assert float(state[1].scale) == 0.5
    assert norms[3] > 0


@three_rows
def test_chain(tx, rounding):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    chained = optax.chain(optax.scale(3.0), tx, optax.scale(0.5))
    _, _, got = run(chained, params, grads)
    _, _, inner = run(tx, params, [optax.tree.scale(3.0, grad) for grad in grads])
    assert_trees_close(got, [optax.tree.scale(0.5, updates) for updates in inner], rounding)


def test_tree_map_params_without_change(tx):
    state = tx.init(normal_tree("transformer", seed=0))
    assert_trees_equal(
        optax.tree_map_params(tx, lambda leaf: leaf, state, is_leaf=is_masked), state
    )


def test_tree_map_params_gives_usable_specs(tx, coded):
    """Full-size state takes the parameter's spec, low-rank state (of other shapes) does not."""
    params = normal_tree("mlp", seed=0)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(lambda leaf: PartitionSpec(*(None,) * leaf.ndim), params)
    specs["hidden"]["bias"] = PartitionSpec("model")
    specs["hidden"]["kernel"] = PartitionSpec(None, "model")
    state_specs = optax.tree_map_params(
        tx,
        lambda leaf, spec: leaf if is_masked(leaf) else spec,
        jax.eval_shape(tx.init, params),
        specs,
        transform_non_params=lambda _: PartitionSpec(),
        is_leaf=is_masked,
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert_trees_equal(state, tx.init(params))
    split = [leaf.shape for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert split == ([] if coded else [(8,), (8,)])  # Adam's two moments of the bias


# In Flax


@three_rows
def test_nnx_optimizer(tx, rounding):
    """`nnx.Optimizer` takes the same steps as the plain tree, in one trace."""

    class Layer(nnx.Module):
        def __init__(self, shapes):
            for name, value in shapes.items():
                setattr(self, name, nnx.Param(value))

    class Model(nnx.Module):
        def __init__(self, tree):
            for name, leaves in tree.items():
                setattr(self, name, Layer(leaves))

    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=5)
    model = Model(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, grad):
        traces.append(1)

        def loss(model):  # has the gradient `grad`
            return optax.tree.vdot(nnx.to_pure_dict(nnx.state(model, nnx.Param)), grad)

        optimizer.update(model, nnx.grad(loss)(model))

    for grad in grads:
        step(model, optimizer, grad)
    want, _, _ = run(tx, params, grads)
    assert_trees_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), want, rounding)
    assert len(traces) == 1


@three_rows
def test_linen_train_state(tx, rounding):
    """`with_partitioning` boxes change neither the steps nor what is projected."""

    def boxes(tree):
        names = {0: (), 1: ("model",), 2: (None, "model")}
        return jax.tree.map(lambda leaf: nn.Partitioned(leaf, names[leaf.ndim]), tree)

    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=5)
    state = TrainState.create(apply_fn=None, params=boxes(params), tx=tx)
    before = jax.tree.structure(state)
    traces = []

    @jax.jit
    def step(state, grad):
        traces.append(1)
        return state.apply_gradients(grads=grad)

    for grad in grads:
        state = step(state, boxes(grad))
    want, _, _ = run(tx, params, grads)
    assert_trees_close(nn.unbox(state.params), want, rounding)
    assert len(traces) == 1
    assert jax.tree.structure(state) == before


# In Orbax


@rows("natural_galore", "gradnormlorp_8bit", "low_rank_muon")
def test_checkpoint_continues_bit_for_bit(tx, tmp_path):
    """Saved after step 2, restored into a fresh state, continued over the refits at 3 and 6."""
    params, grads = normal_tree("transformer", seed=0), gradients("transformer", steps=8)
    middle, state, _ = run(tx, params, grads[:2])
    want, want_state, _ = run(tx, middle, grads[2:], state)

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.StandardSave((middle, state)))
        manager.wait_until_finished()
        target = jax.eval_shape(lambda: (params, tx.init(params)))
        middle, state = manager.restore(2, args=ocp.args.StandardRestore(target))
    got, got_state, _ = run(tx, middle, grads[2:], state)
    assert_trees_equal(got, want)
    assert_trees_equal(got_state, want_state)
