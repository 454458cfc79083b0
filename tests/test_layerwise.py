"""The layer-wise update: equal to the ordinary one, refits where it should, and holds no gradient of the stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lib import llama, steps

import optax_lowrank as ol
from tests.helpers import OPTIMIZERS, assert_trees_close

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


def apart(stack):
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(LAYERS)}


_galore = {"rank": 2, "fit": ol.svd()}
WRAPPED = {
    "on_staleness": lambda: ol.galore(
        0.03, update_proj_gap=ol.on_staleness(0.7, min_gap=1, max_gap=4), **_galore
    ),
    "accumulate": lambda: ol.galore(0.03, update_proj_gap=1, accumulate=2, **_galore),
    "MultiSteps": lambda: optax.MultiSteps(
        ol.fira(0.03, update_proj_gap=1, **_galore), 2
    ).gradient_transformation(),
    "inject_hyperparams": lambda: ol.inject_hyperparams(ol.galore)(
        learning_rate=optax.linear_schedule(0.03, 0.01, 5), update_proj_gap=3, **_galore
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_equals_the_ordinary_step_of_the_whole_tree(name, problem):
    """One optimizer over all layers at once, each layer a subtree of its own."""
    layers, head, xs = problem
    tx = WRAPPED[name]()

    def loss_fn(layers, x):
        for i in range(LAYERS):
            x = block(layers[str(i)], x)
        return head_loss(head, x)

    @jax.jit
    def ordinary(layers, state, x):
        updates, state = tx.update(jax.grad(loss_fn)(layers, x), state, layers)
        return optax.apply_updates(layers, updates), state

    layerwise = jax.jit(
        lambda layers, state, x: ol.layerwise_step(block, tx, layers, state, x, head_loss, head)
    )
    got, want = (layers, jax.vmap(tx.init)(layers)), (apart(layers), tx.init(apart(layers)))
    for x in xs:
        got, want = layerwise(*got, x)[1:3], ordinary(*want, x)
        assert_trees_close(apart(got[0]), want[0], rtol=1e-5)
    assert jnp.abs(got[0]["up"]["kernel"] - layers["up"]["kernel"]).max() > 0.01


def test_diagnostics_of_a_stack(problem):
    layers, _, _ = problem
    state = jax.vmap(ol.galore(0.03, rank=2).init)(layers)
    found = jax.vmap(ol.diagnostics)(state)
    assert found["up/kernel"].rank.shape == (LAYERS, 1)


def test_apply_has_the_index_of_its_layer(problem):
    layers, head, (x, *_) = problem
    tx = optax.set_to_zero()
    mark = lambda layer, updates, i: jax.tree.map(lambda w, u: w + u + i, layer, updates)
    done = jax.jit(
        lambda layers, state: ol.layerwise_step(
            block, tx, layers, state, x, head_loss, head, apply=mark
        )
    )(layers, jax.vmap(tx.init)(layers))
    moved = done.layers["scale"] - layers["scale"]
    np.testing.assert_allclose(moved, np.arange(3.0)[:, None] * np.ones(WIDTH), atol=1e-6)


def test_stochastic_rounding_is_exact_on_average():
    weights = jnp.asarray([1.0, -3.0, 1e-3, 0.0, jnp.inf], jnp.bfloat16)
    updates = jnp.asarray([1e-3, 1e-3, 1e-6, 1e-4, 1.0], jnp.float32)
    rounded = jax.vmap(lambda key: ol.apply_rounded(weights, updates, key))(
        jax.random.split(jax.random.key(0), 20_000)
    )
    assert rounded.dtype == jnp.bfloat16
    exact = np.asarray(weights, np.float64) + np.asarray(updates, np.float64)
    drawn = np.asarray(rounded, np.float64)
    assert np.isinf(drawn[:, 4]).all()
    exact, drawn = exact[:4], drawn[:, :4]
    assert (abs(drawn - exact) <= abs(exact) / 128).all()  # one of the two neighbours
    # the mean of 20,000 coins of one unit in the last place is off by 1 / 280 of it, at 1 sigma
    np.testing.assert_allclose(drawn.mean(0), exact, rtol=5 / 280 / 128)
    assert (optax.apply_updates(weights, updates.astype(jnp.bfloat16))[:2] == weights[:2]).all()


def test_rounding_leaves_other_dtypes_to_optax():
    params = {"w": jnp.ones(3), "n": jnp.arange(3)}
    updates = {"w": jnp.full(3, 1e-4), "n": jnp.ones(3, int)}
    done = ol.apply_rounded(params, updates, jax.random.key(0))
    assert_trees_close(done, optax.apply_updates(params, updates), rtol=0)


def test_saves_most_of_the_gradients():
    # Wide enough that the stack's gradients are most of what the step holds beside parameters and state.
    config = llama.LlamaConfig(hidden=256, ffn=256, layers=6, heads=2, vocab=64)
    galore = ol.galore(1e-3, rank=32, fit=ol.gaussian())
    tx = optax.chain(optax.clip_by_global_norm(1.0), galore)  # needs all gradients of what it sees

    def peak(step):
        state = steps.TrainState(step.shapes, jax.eval_shape(step.init, step.shapes))
        tokens = jax.ShapeDtypeStruct((1, 65), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = jax.jit(step.__call__, donate_argnums=0).lower(state, tokens, key)
        return steps.peak_bytes(lowered.compile())

    layerwise = steps.LayerWise(config, tx)
    grads = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layerwise.shapes.layers))
    assert peak(steps.Whole(config, tx)) - peak(layerwise) >= 0.5 * grads
