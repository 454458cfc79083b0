"""The layer-wise update: equal to the ordinary one, refits where it should, and holds no gradient of the stack."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol
from tests.helpers import OPTIMIZERS, assert_trees_close

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import layerwise_llama
import llama

LAYERS, WIDTH, HIDDEN, BATCH = 3, 6, 8, 10


def block(layer, x):
    y = x / (1 + jnp.abs(x)) * layer["scale"][None]
    return x + jnp.tanh(y @ layer["up"]["kernel"]) @ layer["down"]["kernel"]


def head_loss(head, x):
    return jnp.mean((x @ head["kernel"] - 1) ** 2)


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32))
    layers = {
        "scale": normal(LAYERS, WIDTH),
        "up": {"kernel": normal(LAYERS, WIDTH, HIDDEN)},
        "down": {"kernel": normal(LAYERS, HIDDEN, WIDTH)},
    }
    return layers, {"kernel": normal(WIDTH, 2)}, normal(4, BATCH, WIDTH)


def whole_gradient_step(tx, layers, state, x, head):
    """Every layer's gradient first, then `tx` on one layer after the other."""

    def loss_fn(layers, head, x):
        for i in range(LAYERS):
            x = block(jax.tree.map(lambda leaf, i=i: leaf[i], layers), x)
        return head_loss(head, x)

    loss, grads = jax.value_and_grad(loss_fn, argnums=(0, 1, 2))(layers, head, x)

    def update(args):
        grads, state, layer = args
        updates, state = tx.update(grads, state, layer)
        return optax.apply_updates(layer, updates), state

    layers, state = jax.lax.map(update, (grads[0], state, layers))
    return ol.LayerwiseStep(loss, layers, state, *grads[1:])


@pytest.mark.parametrize("name", ["adamw", "fira", "gradnormlorp"])
def test_equals_whole_gradient_and_then_update_of_each_layer(name, problem):
    tx = optax.adamw(0.03) if name == "adamw" else OPTIMIZERS[name](0.03, weight_decay=0.1)
    layers, head, xs = problem
    start = layers, jax.vmap(tx.init)(layers)
    layerwise = jax.jit(
        lambda layers, state, x: ol.layerwise_step(block, tx, layers, state, x, head_loss, head)
    )
    ordinary = jax.jit(lambda layers, state, x: whole_gradient_step(tx, layers, state, x, head))
    got, want = start, start
    for x in xs:  # refits at steps 0 and 3
        done, expected = layerwise(*got, x), ordinary(*want, x)
        assert_trees_close(done, expected, rtol=1e-5)
        got, want = done[1:3], expected[1:3]
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max((*range(1, a.ndim),)), got[0], start[0])
    assert all((leaf > 0.01).all() for leaf in jax.tree.leaves(moved))  # every layer of every leaf


def test_only_due_layers_are_refit(problem):
    layers, head, xs = problem
    calls = []

    def fit(key, G, P):
        jax.debug.callback(lambda: calls.append(None))
        return ol.svd()(key, G, P)

    tx = ol.galore(0.03, rank=2, update_proj_gap=3, fit=fit)
    state = jax.vmap(tx.init)(layers)
    step = jax.jit(
        lambda layers, state, x: ol.layerwise_step(block, tx, layers, state, x, head_loss, head)
    )
    fits = []
    for x in xs:
        _, layers, state, *_ = jax.block_until_ready(step(layers, state, x))
        jax.effects_barrier()
        fits.append(len(calls))
    # two matrices a layer; a `cond` turned into `select` would fit on every step
    assert fits == [2 * LAYERS, 2 * LAYERS, 2 * LAYERS, 4 * LAYERS]


def test_mistakes_are_explained(problem):
    layers, head, (x, *_) = problem
    tx = ol.galore(0.03, rank=2)
    with pytest.raises(ValueError, match=r"`state` .*count is \(\)\. .* `jax.vmap\(tx.init\)"):
        ol.layerwise_step(block, tx, layers, tx.init(layers), x, head_loss, head)
    state = jax.vmap(tx.init)(layers)
    narrower = lambda layer, x: block(layer, x)[:, 1:]
    with pytest.raises(TypeError, match="carry"):
        ol.layerwise_step(narrower, tx, layers, state, x, head_loss, head)


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_saves_most_of_the_gradients(name):
    # Wide enough that the stack's gradients are most of what the step holds beside parameters and state.
    config = llama.LlamaConfig(hidden=256, ffn=256, layers=12, heads=2, vocab=64)
    model = layerwise_llama.StackedLlama(config)
    tx = optax.adamw(1e-3) if name == "adamw" else ol.galore(1e-3, rank=32, fit=ol.gaussian())
    tx = layerwise_llama.Parts(tx, optax.adamw(1e-3))
    peak = {
        make: layerwise_llama.peak_bytes(model, *make(model, tx))
        for make in (layerwise_llama.ordinary_step, layerwise_llama.layerwise_step)
    }
    layers = jax.eval_shape(lambda: model.init(0)).layers
    grads = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    saved = peak[layerwise_llama.ordinary_step] - peak[layerwise_llama.layerwise_step]
    assert saved >= 0.5 * grads


def test_example_learns(capsys):
    config = llama.LlamaConfig(hidden=32, ffn=32, layers=2, heads=2)
    losses = layerwise_llama.train(config, steps=10)
    assert losses[-1] < losses[0] - 0.1
    assert "step   10" in capsys.readouterr().out
