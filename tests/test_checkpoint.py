"""Orbax: a run that was saved and restored is the run that was not, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_lowrank as ol

from .helpers import assert_trees_equal, gradients, normal_tree

# Saved after 2 updates; every matrix is refit at least twice in the 6 that follow.
SAVED, STEPS = 2, 8
small = functools.partial(ol.galore, 0.1, rank=2, update_proj_gap=3)


def staggered():
    refresh = ol.every(3, stagger=True)
    core = ol.low_rank(optax.scale_by_lion(), rank=2, refresh=refresh, fit=ol.dct())
    return ol.assemble(core, 0.1, rank=2)


OPTIMIZERS = {
    "galore": small,
    "warm_start": functools.partial(small, fit=ol.subspace_iteration(), mu_dtype=jnp.bfloat16),
    "two_sided": functools.partial(small, side="both", rotate_moments=True, fit=ol.svd()),
    "seeded_in_codes": functools.partial(
        small, fit=ol.seeded(), state_bits={"bits": 8, "min_size": 1, "stochastic": True}
    ),
    "staggered": staggered,
    "multi_steps": lambda: optax.MultiSteps(small(), every_k_schedule=2),
}


@functools.lru_cache
def uninterrupted(name):
    """The update function, gradients, and parameters and state after SAVED and after STEPS updates."""
    tx, grads = OPTIMIZERS[name](), gradients("mlp", STEPS)
    params = normal_tree("mlp", seed=0)

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    states = [(params, tx.init(params))]
    for grad in grads:
        states.append(step(*states[-1], grad))
    return tx, step, grads, states[SAVED], states[-1]


def target(tx):
    """Shapes and a device, as a new process would have them: nothing of the old state is at hand."""
    params = jax.eval_shape(functools.partial(normal_tree, "mlp", seed=0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = functools.partial(jax.ShapeDtypeStruct, sharding=here)
    return jax.tree.map(
        lambda x: placed(x.shape, x.dtype), (params, jax.eval_shape(tx.init, params))
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continues_bit_for_bit_from_a_checkpoint_manager(name, tmp_path):
    tx, step, grads, saved, want = uninterrupted(name)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(SAVED, args=ocp.args.StandardSave(saved))
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == SAVED
        restored = manager.restore(SAVED, args=ocp.args.StandardRestore(target(tx)))
    assert_trees_equal(restored, saved)
    for grad in grads[SAVED:]:
        restored = step(*restored, grad)
    assert_trees_equal(restored, want)


def test_continues_bit_for_bit_through_the_new_interface(tmp_path):
    v1 = getattr(ocp, "v1", None) or pytest.skip("this Orbax has no `v1`")
    tx, step, grads, saved, want = uninterrupted("galore")
    v1.save(tmp_path / "state", saved)
    restored = v1.load(tmp_path / "state", target(tx))
    for grad in grads[SAVED:]:
        restored = step(*restored, grad)
    assert_trees_equal(restored, want)


def test_nnx_optimizer_continues_bit_for_bit(tmp_path):
    class Model(nnx.Module):
        def __init__(self, seed):
            self.linear = nnx.Linear(6, 8, rngs=nnx.Rngs(seed))

    def fresh(seed):
        model = Model(seed)
        return model, nnx.Optimizer(model, small(fit=ol.svd()), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(jnp.sin(model.linear(x))))(model))

    inputs = [
        jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).standard_normal((6, 5, 6))
    ]
    model, optimizer = fresh(0)
    for x in inputs[:SAVED]:
        step(model, optimizer, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
        checkpointer.wait_until_finished()
        other_model, other_optimizer = fresh(1)
        restored = checkpointer.restore(
            tmp_path / "state", nnx.state((other_model, other_optimizer))
        )
    nnx.update((other_model, other_optimizer), restored)
    for x in inputs[SAVED:]:
        step(model, optimizer, x)
        step(other_model, other_optimizer, x)
    assert_trees_equal(nnx.state((other_model, other_optimizer)), nnx.state((model, optimizer)))


def test_contrib_cannot_be_saved(tmp_path):
    """It keeps an array without elements for every leaf that is not projected; ours keeps nothing there."""
    params = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
    state = optax.contrib.galore(0.1, rank=2).init(params)
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(ValueError, match="zero size"):
        checkpointer.save(tmp_path / "contrib", state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ours", small().init(params))
