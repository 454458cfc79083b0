"""GaLore: the authors' trajectories, Optax contrib's until it refreshes, and the bytes of the formula."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import GaLoreDimensionNumbers

import optax_lowrank as ol

from .helpers import (
    assert_trees_close,
    assert_trees_equal,
    gradients,
    low_rank_state,
    normal_tree,
    run,
    turning_gradients,
)
from .reference import galore as reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
SVD = ol.svd()


def trajectory(tx, grads):
    """Updates of one kernel along (steps, m, n) gradients."""
    params = {"kernel": jnp.zeros(grads.shape[1:])}
    _, _, updates = run(tx, params, [{"kernel": jnp.asarray(grad)} for grad in grads])
    return np.stack([u["kernel"] for u in updates])


def assert_follows(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_golden_trace(shape):
    """Over two refreshes. 2e-3: five times what a literal transcription in float32 is off by."""
    trace = np.load(GOLDEN / f"galore_{shape}.npz")
    tx = ol.galore(1.0, fit=ol.svd(), **json.loads(str(trace["config"])))
    assert_follows(trajectory(tx, trace["grads"]), trace["updates"], 2e-3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)], ids=str)
def test_reference_on_other_gradients(shape):
    """Gradients of slowly changing direction and any hyperparameters; gaps in the spectrum keep SVDs comparable."""
    grads = turning_gradients(shape).astype(np.float32)
    config = {"rank": 4, "update_proj_gap": 5, "scale": 0.7, "learning_rate": 0.03}
    config |= {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    got = trajectory(ol.galore(fit=ol.svd(), **config), grads)
    # float32 SVDs against float64 ones
    assert_follows(got, reference.reference(grads, **config), 2e-3)


def test_randomized_default_follows_svd_where_the_spectrum_ends():
    """Gradients of rank 4 have one basis up to rotation and signs, and sketches find it."""
    random = np.random.default_rng(0)
    grads = random.standard_normal((6, 12, 4)) @ random.standard_normal((6, 4, 20))
    tx = functools.partial(ol.galore, 1.0, rank=4, update_proj_gap=2)
    got = trajectory(tx(), grads.astype(np.float32))
    # singular vectors of float32 sums; Adam divides by small coordinates
    assert_follows(got, trajectory(tx(fit=ol.svd()), grads.astype(np.float32)), 5e-3)


CONTRIB_TREE = {
    "up": {"kernel": (12, 20), "bias": (20,)},
    "down": {"kernel": (20, 12), "bias": (12,)},
}


def contrib_problem(steps):
    random = np.random.default_rng(0)

    def draw():
        is_shape = lambda x: isinstance(x, tuple)
        return jax.tree.map(
            lambda s: jnp.asarray(random.standard_normal(s), jnp.float32),
            CONTRIB_TREE,
            is_leaf=is_shape,
        )

    return draw(), [draw() for _ in range(steps)]


def test_same_updates_as_contrib_until_it_refreshes():
    """From there on the moments are in bases of other signs. Weight decay included."""
    params, grads = contrib_problem(9)
    options = {"learning_rate": 0.1, "rank": 4, "update_proj_gap": 6, "weight_decay": 0.01}
    contrib = optax.contrib.galore(**options, scale=1.0)
    ours = ol.galore(**options, scale=1.0, side="long", fit=ol.svd())
    _, _, want = run(contrib, params, grads)
    _, _, got = run(ours, params, grads)
    assert_trees_close(got[:6], want[:6], 1e-4)  # two float32 programs
    with pytest.raises(AssertionError):
        assert_trees_close(got[6:], want[6:], 1e-4)


def test_the_short_side_gives_another_trajectory():
    params, grads = contrib_problem(2)
    options = {"learning_rate": 0.1, "rank": 4, "scale": 1.0, "fit": ol.svd()}
    _, _, long = run(ol.galore(**options, side="long"), params, grads)
    _, _, short = run(ol.galore(**options), params, grads)
    assert np.abs(long[1]["up"]["kernel"] - short[1]["up"]["kernel"]).max() > 0.01


def test_contrib_dimension_numbers_are_accepted():
    """An attention kernel; and a stack, whose unnamed axis contrib refuses."""
    random = np.random.default_rng(0)
    grads = [
        {"kernel": jnp.asarray(random.standard_normal((6, 2, 4)), jnp.float32)} for _ in range(3)
    ]
    axes = {"kernel": GaLoreDimensionNumbers(0, (1, 2))}
    options = {"learning_rate": 0.1, "rank": 2, "scale": 1.0, "weight_dimension_numbers": axes}
    _, _, want = run(optax.contrib.galore(**options), grads[0], grads)
    _, _, got = run(ol.galore(**options, side="long", fit=ol.svd()), grads[0], grads)
    assert_trees_close(got, want, 1e-4)

    options["weight_dimension_numbers"] = {"kernel": GaLoreDimensionNumbers(0, 2)}
    options["rank"] = 3
    with pytest.raises(ValueError, match="All axes must be specified"):
        optax.contrib.galore(**options).init(grads[0])
    state = low_rank_state(ol.galore(**options).init(grads[0]))
    assert state.leaves["kernel"].basis.shape == (2, 4, 3)


# Memory


def llama(layers=24, d=2048, ff=5461, vocabulary=32000):
    """The shapes of the papers' LLaMA of 1B parameters."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def layer():
        attention = {f"{name}_proj": {"kernel": leaf(d, d)} for name in "qkvo"}
        mlp = {name: {"kernel": leaf(d, ff)} for name in ("gate_proj", "up_proj")}
        mlp["down_proj"] = {"kernel": leaf(ff, d)}
        norms = {name: {"scale": leaf(d)} for name in ("input_norm", "post_attention_norm")}
        return {"attention": attention, "mlp": mlp, **norms}

    ends = {
        "embed_tokens": {"embedding": leaf(vocabulary, d)},
        "lm_head": {"kernel": leaf(d, vocabulary)},
    }
    return {"layers": {str(i): layer() for i in range(layers)}, **ends, "norm": {"scale": leaf(d)}}


@pytest.mark.parametrize("side", ["short", "long"])
def test_bytes_of_a_llama(side):
    """mr + 2nr floats a matrix, m the projected side; 2 a dense parameter; nothing is allocated."""
    r, d, ff, layers, vocabulary = 512, 2048, 5461, 24, 32000
    params = llama(layers, d, ff, vocabulary)
    report = ol.memory_report(ol.galore(1e-3, rank=r, side=side), params)
    m, n = (d, ff) if side == "short" else (ff, d)
    projected = layers * (4 * (d * r + 2 * d * r) + 3 * (m * r + 2 * n * r))
    dense = 2 * (2 * vocabulary * d + (2 * layers + 1) * d)
    assert report.arrays == 4 * (projected + dense)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert report.parameters == report.gradients == 4 * parameters
    assert report.adamw == 4 * 2 * parameters

    # one line for all that is no array: of each matrix 22 bytes of statistics and Adam's count; three counts of all
    assert report.counters == (22 + 4) * 7 * layers + 3 * 4
    assert report.state == report.arrays + report.counters


# Options


@functools.lru_cache
def three_steps(**options):
    """Parameters, gradients, state and updates of the tree above; exact bases compile fastest."""
    params, grads = contrib_problem(3)
    _, state, updates = run(ol.galore(0.1, **{"rank": 4, "fit": SVD, **options}), params, grads)
    return params, grads, state, updates


def test_base_optimizer_replaces_adam_everywhere():
    """Momentum is linear: with one basis, full rank and scale 1 it is momentum on every leaf."""
    params, grads = contrib_problem(4)
    tx = ol.galore(0.1, rank=11, scale=1.0, base_optimizer=optax.trace(0.9), fit=ol.svd())
    _, state, got = run(tx, params, grads)
    _, _, want = run(optax.sgd(0.1, momentum=0.9), params, grads)
    for name in ("up", "down"):
        assert_trees_close([u[name]["bias"] for u in got], [u[name]["bias"] for u in want], 1e-6)
        # rank 11 of 12 misses the last direction of the first gradient only
        P = low_rank_state(state).leaves[f"{name}/kernel"].basis[0]
        left = lambda u, P=P, name=name: P @ (P.T @ u) if name == "up" else (u @ P) @ P.T
        for ours, plain in zip(got, want, strict=True):
            projected = left(plain[name]["kernel"])
            np.testing.assert_allclose(ours[name]["kernel"], projected, rtol=0, atol=1e-5)


def test_base_optimizer_is_rotated_on_request():
    params, grads = contrib_problem(5)
    make = functools.partial(
        ol.galore,
        0.1,
        rank=4,
        update_proj_gap=2,
        base_optimizer=optax.scale_by_lion(),
        fit=ol.svd(),
    )
    _, _, kept = run(make(), params, grads)
    _, _, rotated = run(make(rotate_moments=True), params, grads)
    assert_trees_equal(rotated[:2], kept[:2])
    assert np.abs(rotated[2]["up"]["kernel"] - kept[2]["up"]["kernel"]).max() > 0.01


def test_dense_takes_over_the_leaves_that_are_not_projected():
    """With its own learning rate, and without the weight decay of the rest."""
    _, grads, _, got = three_steps(weight_decay=0.1, dense=optax.sgd(3.0))
    *_, plain = three_steps(weight_decay=0.1)
    for name in ("up", "down"):
        assert_trees_close(*([u[name]["kernel"] for u in x] for x in (got, plain)), 1e-4)
        assert_trees_close(
            [u[name]["bias"] for u in got], [-3 * g[name]["bias"] for g in grads], 1e-6
        )


@pytest.mark.parametrize("form", ["tree", "callable", "prefix"])
def test_weight_decay_in_full_space_where_the_mask_says(form):
    """−η λ W on top of the update without decay, not scaled, not projected."""
    leaves = {"kernel": True, "bias": False}
    mask = {"tree": {"up": leaves, "down": leaves}, "prefix": {"up": True, "down": False}}.get(form)
    if form == "callable":
        mask = lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)
    params, grads, _, (plain, *_) = three_steps()
    tx = ol.galore(0.1, rank=4, fit=SVD, weight_decay=0.2, mask=mask)
    _, _, (got,) = run(tx, params, grads[:1])
    for name in ("up", "down"):
        for leaf in ("kernel", "bias"):
            decays = name == "up" if form == "prefix" else leaf == "kernel"
            want = plain[name][leaf] - 0.1 * 0.2 * decays * params[name][leaf]
            np.testing.assert_allclose(got[name][leaf], want, rtol=0, atol=1e-6)


def test_scale_does_not_touch_dense_leaves():
    *_, quarter = three_steps()
    *_, one = three_steps(scale=1.0)
    np.testing.assert_array_equal(quarter[2]["up"]["bias"], one[2]["up"]["bias"])
    np.testing.assert_allclose(4 * quarter[2]["up"]["kernel"], one[2]["up"]["kernel"], rtol=1e-5)


def test_matrices_no_longer_than_the_rank_are_dense():
    with pytest.warns(UserWarning, match="no leaf is projected"):
        params, grads, state, got = three_steps(rank=12)
    assert not ol.diagnostics(state)
    _, _, want = run(optax.adam(0.1), params, grads)
    assert_trees_close(got, want, 1e-5)


def test_moment_dtype():
    params = normal_tree("mlp", seed=0)
    state = ol.galore(0.1, rank=2, mu_dtype=jnp.bfloat16).init(params)
    for moment, dtype in {"mu": jnp.bfloat16, "nu": jnp.float32}.items():
        found = jax.tree.leaves([tree for _, tree in optax.tree.get_all_with_path(state, moment)])
        assert len(found) == 5  # one for each leaf, projected or dense
        assert {x.dtype for x in found} == {jnp.dtype(dtype)}


def test_seed_changes_sketches_only():
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=2)
    sketch = ol.randomized_svd(oversample=0, power_iterations=0)
    make = functools.partial(ol.galore, 0.1, rank=2, fit=sketch)
    _, _, zero = run(make(), params, grads)
    _, _, one = run(make(seed=1), params, grads)
    assert np.abs(zero[1]["hidden"]["kernel"] - one[1]["hidden"]["kernel"]).max() > 1e-3
    assert_trees_equal(zero[1]["hidden"]["bias"], one[1]["hidden"]["bias"])


def test_the_gap_may_be_set_in_an_injected_state():
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=5)
    tx = ol.inject_hyperparams(ol.galore)(0.1, rank=2, update_proj_gap=3, fit=SVD)

    def last_fit(gap):
        state = tx.init(params)
        state.hyperparams["update_proj_gap"] = jnp.int32(gap)
        _, state, _ = run(tx, params, grads, state)
        return 4 - int(ol.diagnostics(state)["hidden/kernel"].steps_since_refresh[0])

    assert [last_fit(gap) for gap in (1, 2, 3, 9)] == [4, 4, 3, 0]


def test_the_gap_may_be_a_policy():
    params = {f"layer{i}": {"kernel": jnp.eye(8, 12) + i} for i in range(2)}
    tx = ol.galore(1e-3, rank=2, update_proj_gap=ol.every(4, stagger=True))
    state, update = tx.init(params), jax.jit(tx.update)
    ages = []
    for _ in range(6):
        _, state = update(params, state, params)
        ages.append([int(leaf.steps_since_refresh[0]) for leaf in ol.diagnostics(state).values()])
    # after the first fit at step 0 each matrix has a phase of its own, half an interval apart
    assert [age.index(0) if 0 in age else None for age in ages[1:]] == [None, 1, None, 0, None]
