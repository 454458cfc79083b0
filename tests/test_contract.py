"""What Optax, Flax and Orbax expect of an optimizer, for every row of `helpers.OPTIMIZERS`."""

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

# Two programs for the same step round differently, and Adam divides each coordinate by its own size, which makes a
# rounding error in a small one visible. A mistake shows at the size of the step itself.
ROUNDING = 2e-3


# In module scope pytest runs all tests of one row together, on programs that are compiled once.
@pytest.fixture(scope="module", params=OPTIMIZERS)
def factory(request):
    return OPTIMIZERS[request.param]


@pytest.fixture(scope="module")
def tx(factory):
    return factory(learning_rate=1e-2)


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


# The transformation itself


@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_trace_for_many_steps_with_unknown_extra_args(tx, problem):
    traces = []

    @jax.jit
    def step(params, state, grad):
        traces.append(1)
        updates, state = tx.update(grad, state, params, value=jnp.float32(1), unknown=None)
        return optax.apply_updates(params, updates), state

    params = normal_tree(problem, seed=0)
    state = tx.init(params)
    before = shapes(state)
    for grad in gradients(problem, steps=8):
        params, state = step(params, state, grad)
    assert len(traces) == 1
    assert shapes(state) == before
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("problem", ["mlp", "transformer"])
def test_converges(factory, problem):
    """A quadratic of full rank: the subspace must move for its minimum to be reached."""
    params, target = normal_tree(problem, seed=0), normal_tree(problem, seed=1)
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


def test_jit_changes_nothing(tx):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=2)
    _, want_state, want = run(tx, params, grads)
    state, got = tx.init(params), []
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        got.append(updates)
    assert_trees_close(got, want, ROUNDING)
    assert_trees_close(state, want_state, ROUNDING)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_dtypes_survive(tx, dtype):
    """Updates come in the parameters' dtype, the state keeps its own: moments float32 by default."""
    params = normal_tree("mlp", seed=0, dtype=dtype)
    state = tx.init(params)

    @jax.jit
    def step(grad, state, taken):
        # Both branches of a `cond` must agree in every shape and dtype.
        return jax.lax.cond(
            taken,
            lambda: tx.update(grad, state, params),
            lambda: (grad, state),
        )

    for grad in gradients("mlp", steps=2, dtype=dtype):
        updates, new_state = step(grad, state, True)
        assert shapes(updates) == shapes(params)
        assert shapes(new_state) == shapes(state)
        state = new_state
    state_dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert {d for d in state_dtypes if jnp.issubdtype(d, jnp.floating)} == {jnp.dtype("float32")}


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
    assert all(leaf.is_deleted() for leaf in old)


def test_absent_leaves(tx):
    """A parameter may be `None`, as with `nnx.split` or `eqx.partition`."""
    params, (grad,) = normal_tree("mlp", seed=0), gradients("mlp", steps=1)
    params["hidden"]["bias"] = grad["hidden"]["bias"] = None
    _, _, (updates,) = run(tx, params, [grad])
    assert updates["hidden"]["bias"] is None
    assert shapes(updates) == shapes(params)


# Inside Optax's wrappers


def test_schedule_equals_its_constant(factory):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    _, _, constant = run(factory(learning_rate=1e-2), params, grads)
    _, _, scheduled = run(factory(learning_rate=optax.constant_schedule(1e-2)), params, grads)
    assert_trees_close(scheduled, constant, ROUNDING)


def test_inject_hyperparams(factory):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    injected = optax.inject_hyperparams(factory, static_args=ol.INJECT_STATIC_ARGS)(
        learning_rate=1e-2
    )
    _, want_state, want = run(factory(learning_rate=1e-2), params, grads)
    _, state, got = run(injected, params, grads)
    assert_trees_close(got, want, ROUNDING)
    # A traced weight decay may be nonzero, so it has a place in the state, but no arrays.
    assert_trees_close(jax.tree.leaves(state.inner_state), jax.tree.leaves(want_state), ROUNDING)

    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0)
    _, _, (still,) = run(injected, params, grads[:1], state)
    assert optax.tree.norm(still) == 0


def test_multi_steps(tx):
    """Two micro-batches are one step on their mean, and only that step counts towards a refit."""
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=8)
    pairs = zip(grads[::2], grads[1::2], strict=True)
    means = [optax.tree.scale(0.5, optax.tree.add(*pair)) for pair in pairs]
    _, state, got = run(optax.MultiSteps(tx, every_k_schedule=2), params, grads)
    _, want_state, want = run(tx, params, means)
    assert all(optax.tree.norm(updates) == 0 for updates in got[::2])
    assert_trees_close(got[1::2], want, ROUNDING)
    assert_trees_close(state.inner_opt_state, want_state, ROUNDING)


def test_masked_passes_other_leaves_through(tx):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    mask = {"embed": True, "hidden": True, "out": False}
    _, _, got = run(optax.masked(tx, mask), params, grads)

    def chosen(tree):
        return {name: tree[name] for name in mask if mask[name]}

    _, _, want = run(tx, chosen(params), [chosen(grad) for grad in grads])
    assert_trees_close([chosen(updates) for updates in got], want, ROUNDING)
    assert_trees_equal([updates["out"] for updates in got], [grad["out"] for grad in grads])


def test_partition_equals_separate_optimizers(tx):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    labels = {"embed": "sgd", "hidden": "low_rank", "out": "sgd"}
    both = optax.partition({"low_rank": tx, "sgd": optax.sgd(0.1)}, labels)
    _, _, got = run(both, params, grads)

    def hidden(tree):
        return {"hidden": tree["hidden"]}

    _, _, want = run(tx, hidden(params), [hidden(grad) for grad in grads])
    assert_trees_close([hidden(updates) for updates in got], want, ROUNDING)


def test_apply_if_finite(tx):
    """The wrapper leaves out a step with a NaN; the following steps are as if it had not been."""
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=5)
    bad = optax.tree.full_like(grads[0], jnp.nan)
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    _, state, got = run(guarded, params, [*grads[:3], bad, *grads[3:]])
    _, want_state, want = run(tx, params, grads)
    assert optax.tree.norm(got.pop(3)) == 0
    assert_trees_close(got, want, ROUNDING)
    assert_trees_close(state.inner_state, want_state, ROUNDING)


def test_chain(tx):
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=4)
    chained = optax.chain(optax.scale(3.0), tx, optax.scale(0.5))
    _, _, got = run(chained, params, grads)
    _, _, inner = run(tx, params, [optax.tree.scale(3.0, grad) for grad in grads])
    assert_trees_close(got, [optax.tree.scale(0.5, updates) for updates in inner], ROUNDING)


def test_tree_map_params_without_change(tx):
    state = tx.init(normal_tree("transformer", seed=0))
    assert_trees_equal(
        optax.tree_map_params(tx, lambda leaf: leaf, state, is_leaf=is_masked), state
    )


def test_tree_map_params_gives_usable_specs(tx):
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
    assert split == [(8,), (8,)]  # Adam's two moments of the bias


# In Flax


def test_nnx_optimizer(tx):
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
    assert_trees_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), want, ROUNDING)
    assert len(traces) == 1


@pytest.mark.parametrize("boxed", [False, True], ids=["plain", "boxed"])
def test_linen_train_state(tx, boxed):
    """`with_partitioning` boxes change neither the steps nor what is projected."""

    def box(leaf, names):
        return nn.Partitioned(leaf, names) if boxed else leaf

    def boxes(tree):
        names = {0: (), 1: ("model",), 2: (None, "model")}
        return jax.tree.map(lambda leaf: box(leaf, names[leaf.ndim]), tree)

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
    assert_trees_close(nn.unbox(state.params), want, ROUNDING)
    assert len(traces) == 1
    assert jax.tree.structure(state) == before


# In Orbax


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
