"""The arguments of the optimizers: which there are, which may be schedules, and what is said of wrong ones."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import (
    assert_trees_close,
    assert_trees_equal,
    gradients,
    low_rank_state,
    normal_tree,
    run,
)

SHARED = {
    "learning_rate": inspect.Parameter.empty,
    "rank": 128,
    "update_proj_gap": 200,
    "scale": 0.25,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "mu_dtype": None,
    "weight_decay": 0.0,
    "mask": None,
    "weight_dimension_numbers": None,
    "fit": None,
    "side": "short",
    "state_bits": None,
    "rotate_moments": False,
    "dense": None,
    "dense_learning_rate": None,
    "accumulate": 1,
    "axis_name": None,
    "seed": 0,
}
# What each has besides; a name of `SHARED` changes a default, and None takes it away.
OWN = {
    ol.galore: {"base_optimizer": None},
    ol.fira: {"limit": 1.01, "residual_scale": 1.0},
    ol.natural_galore: {
        "history": 4,
        "damping": 1e-3,
        "relative_damping": False,
        "history_dtype": None,
        "preserve_norm": False,
        "precondition": "gradient",
    },
    ol.adarankgrad: {
        "max_residual_energy": 0.3,
        "min_rank": 8,
        "rank_step": 8,
        "on_convergence": None,
        "rotate_moments": True,
    },
    ol.gradnormlorp: {"two_sided": True, "basis_bits": None},
    ol.apollo: {"per": "column", "limit": 1.01},
    ol.low_rank_muon: {
        "beta": 0.95,
        "nesterov": True,
        "ns_steps": 5,
        "consistent_rms": None,
        "update_proj_gap": 20,
        "side": "long",
    },
}
LACKS = {ol.low_rank_muon: {"scale"}}
ALIASES = [pytest.param(make, id=make.__name__) for make in OWN]
SMALL = {"rank": 2, "fit": ol.svd()}


# What there is


@pytest.mark.parametrize("make", ALIASES)
def test_signature_shows_every_argument_and_no_other(make):
    found = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    want = {k: v for k, v in SHARED.items() if k not in LACKS.get(make, ())} | OWN[make]
    assert found == want


@pytest.mark.parametrize("make", ALIASES)
def test_help_explains_every_argument_and_no_other(make):
    """In the section Args, by lines that begin with names; so does what `inject_hyperparams` makes of it."""
    text = inspect.getdoc(make).split("Args:\n")[1].split("\n\n")[0]
    heads = [line for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    names = [name.strip() for head in heads for name in head.split(":")[0].split(",")]
    assert sorted(names) == sorted(inspect.signature(make).parameters)
    assert inspect.signature(ol.inject_hyperparams(make)) == inspect.signature(make)


@pytest.mark.parametrize("make", [ol.apollo, ol.low_rank_muon])
def test_no_fit_is_the_optimizers_own(make):
    """As what hands on an option that was not given has it: `fit=None`."""
    params = {"kernel": jax.ShapeDtypeStruct((64, 96), jnp.float32)}
    arrays = lambda **options: ol.memory_report(make(0.1, rank=8, **options), params).arrays
    assert arrays() == arrays(fit=None) == arrays(fit=ol.seeded()) < arrays(fit=ol.svd())


def test_order_of_galore_is_that_of_contrib():
    theirs, ours = (
        list(inspect.signature(f).parameters.values()) for f in (optax.contrib.galore, ol.galore)
    )
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [p.kind is positional for p in ours] == [i < len(theirs) for i in range(len(ours))]
    params, grads = normal_tree("mlp", 0), gradients("mlp", 1)
    axes = ol.matrix_axes(params)
    by_position = ol.galore(0.1, 2, 3, 1.0, optax.scale_by_lion(), 0.1, True, axes)
    by_name = ol.galore(
        0.1,
        rank=2,
        update_proj_gap=3,
        scale=1.0,
        base_optimizer=optax.scale_by_lion(),
        weight_decay=0.1,
        mask=True,
        weight_dimension_numbers=axes,
    )
    assert_trees_equal(run(by_position, params, grads)[2], run(by_name, params, grads)[2])


@pytest.mark.parametrize("make", ALIASES)
def test_arguments_of_other_methods_are_refused(make):
    others = {name for own in OWN.values() for name in own} - set(
        inspect.signature(make).parameters
    )
    assert others
    for name in others | LACKS.get(make, set()):
        with pytest.raises(TypeError, match=name):
            make(0.1, **{name: 1})


# Schedules

NUMBERS = [
    pytest.param(make, name, id=f"{make.__name__}-{name}")
    for make in OWN
    for name, p in inspect.signature(make).parameters.items()
    if name
    in (
        "learning_rate",
        "dense_learning_rate",
        "on_convergence",
        "consistent_rms",
        "basis_bits",
        "state_bits",
    )
    or (isinstance(p.default, (int, float)) and not isinstance(p.default, bool))
]
FIXED = {"rank", "accumulate", "seed", "history", "ns_steps", "state_bits", "basis_bits"}
VALUES = {"update_proj_gap": 3, "on_convergence": 0.5, "min_rank": 1, "rank_step": 1, "beta": 0.9}


@pytest.mark.parametrize(("make", "name"), NUMBERS)
def test_every_number_follows_a_schedule_or_says_why_not(make, name):
    """Those that do are in the state under their own names."""
    schedule = lambda count: VALUES.get(name, 1.5) + 0 * count
    injected = ol.inject_hyperparams(make)
    arguments = {"learning_rate": 0.1, **SMALL, name: schedule}
    params = {
        "kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    if name in FIXED:
        with pytest.raises(
            TypeError, match=f"`{name}` cannot be a schedule .*: it sets shapes or code"
        ):
            injected(**arguments)
        return
    tx = injected(**arguments)
    state = jax.eval_shape(tx.init, params)
    assert name in state.hyperparams
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert updates["kernel"].shape == (6, 8)


@pytest.mark.parametrize("name", ["rank", "accumulate", "seed"])
def test_what_shapes_and_code_depend_on_is_no_array(name):
    with pytest.raises(TypeError, match=f"`{name}` cannot be a schedule or an array"):
        ol.inject_hyperparams(ol.fira)(0.1, **{"rank": 2, name: jnp.int32(2)})


def test_a_schedule_is_followed():
    """A weight decay of 0, 1, 2 … on top of the update without."""
    params, grads = {"kernel": jnp.ones((6, 8))}, [{"kernel": jnp.asarray(x)} for x in NOISE]
    make = functools.partial(ol.inject_hyperparams(ol.fira), 0.1, **SMALL)
    decays = make(weight_decay=lambda count: count.astype(jnp.float32))
    state, plain = decays.init(params), make(weight_decay=0.0)
    other, update, update_plain = plain.init(params), jax.jit(decays.update), jax.jit(plain.update)
    for t, grad in enumerate(grads):
        got, state = update(grad, state, params)
        want, other = update_plain(grad, other, params)
        np.testing.assert_allclose(got["kernel"], want["kernel"] - 0.1 * t, rtol=0, atol=1e-5)


def test_numbers_are_float32_beside_bfloat16_weights():
    """In bfloat16 b2 = 0.999 is 1, and Adam divides by zero."""
    params = {"kernel": jnp.asarray(NOISE[0], jnp.bfloat16)}
    tx = ol.inject_hyperparams(ol.galore)(0.1, rank=2)
    updates, state = tx.update(params, tx.init(params), params)
    assert state.hyperparams["b2"].dtype == jnp.float32
    assert jnp.all(jnp.any(updates["kernel"] != 0, axis=0))


def test_a_schedule_of_the_interval_is_rounded():
    make = ol.inject_hyperparams(ol.galore)
    gap = optax.piecewise_constant_schedule(2.3, {6: 1.3})  # 2 of six updates, then 3
    tx = make(0.1, rank=2, update_proj_gap=gap, fit=ol.gaussian())
    params = {"kernel": jnp.asarray(NOISE[0])}
    state, update, fits = tx.init(params), jax.jit(tx.update), []
    for _ in range(10):
        _, state = update(params, state, params)
        fits.append(int(low_rank_state(state).stats.last_fit[0]))
    assert sorted(set(fits)) == [0, 2, 4, 6, 9]


NOISE = np.random.default_rng(0).standard_normal((3, 6, 8)).astype(np.float32)


def test_what_is_called_otherwise_stays_what_it_is():
    """Policies, fits, masks and dtypes are callables, and no schedules."""
    tx = ol.inject_hyperparams(ol.adarankgrad)(
        0.1,
        rank=2,
        update_proj_gap=ol.every(2, stagger=True),
        fit=ol.svd(),
        mu_dtype=jnp.bfloat16,
        mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        weight_decay=0.1,
        min_rank=1,
    )
    params = {"kernel": jnp.ones((6, 8))}
    state = tx.init(params)
    assert set(state.hyperparams) == {
        "learning_rate", "weight_decay", "scale", "b1", "b2", "eps", "max_residual_energy", "min_rank", "rank_step"
    }  # fmt: skip
    assert low_rank_state(state).leaves["kernel"].rule.mu.dtype == jnp.bfloat16
    jax.eval_shape(tx.update, params, state, params)


def test_outside_jit_nothing_is_compiled_twice(caplog):
    """Neither on a step without a refit nor at one: the programs of the first two steps do."""
    params = {"kernel": jnp.ones((6, 8))}
    tx = ol.galore(0.1, rank=2, update_proj_gap=2, fit=ol.svd())
    state = tx.init(params)

    def steps(state, grads):
        for grad in grads:
            _, state = tx.update({"kernel": grad}, state, params)
        return jax.block_until_ready(state)

    grads = [jnp.asarray(NOISE[i % 3]) for i in range(6)]
    state = steps(state, grads[:3])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        steps(state, grads[3:])
        assert not [x.message for x in caplog.records if "ompiling" in x.message]
        jax.jit(lambda x: x - 3)(grads[0])
        assert [x.message for x in caplog.records if "ompiling" in x.message]  # they are told of


# What is wrong

WRONG = [
    ({"fit": ol.svd}, TypeError, r"`fit` must be called: `fit=svd\(\)`"),
    ({"fit": ol.seeded}, TypeError, r"`fit` must be called: `fit=seeded\(\)`"),
    ({"fit": "svd"}, TypeError, r"`fit` must be a fit such as `svd\(\)`, got 'svd'"),
    ({"update_proj_gap": ol.every}, TypeError, "`update_proj_gap` must be a number of updates or a policy"),
    ({"update_proj_gap": None}, TypeError, "`update_proj_gap` must be a number of updates or a policy"),
    ({"update_proj_gap": 0}, ValueError, "a positive number of updates, got 0"),
    ({"dense": 0.1}, TypeError, "`dense` must be an Optax transformation, got 0.1"),
    ({"dense": optax.adam}, TypeError, "`dense` must be an Optax transformation"),
    ({"dense": optax.sgd(0.1), "dense_learning_rate": 0.1}, ValueError, "`dense` or `dense_learning_rate`"),
    ({"accumulate": 0}, ValueError, "`accumulate` must be a positive number of micro-batches, got 0"),
    ({"accumulate": 2.0}, ValueError, "`accumulate` must be a positive number of micro-batches, got 2.0"),
    ({"accumulate": True}, ValueError, "`accumulate` must be a positive number of micro-batches, got True"),
    ({"state_bits": 16}, ValueError, "`state_bits` must be None, 8, 4 or a dict"),
    ({"state_bits": 8.0}, ValueError, "`state_bits` must be None, 8, 4 or a dict"),
    ({"state_bits": True}, ValueError, "`state_bits` must be None, 8, 4 or a dict"),
    ({"state_bits": {"bits": 3}}, ValueError, "`bits` must be 8 or 4, got 3"),
    ({"rank": 0}, ValueError, "rank"),
    ({"rank": 1.5}, TypeError, "`rank` must be an int, got 1.5"),
    ({"rank": "2"}, TypeError, "rank"),
    ({"rank": {"kernel": 0}}, ValueError, "rank"),
    ({"side": "left"}, ValueError, '`side` must be "short", "long" or "both"'),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=range(len(WRONG)))
def test_wrong_values_are_told_in_the_factory(options, error, words):
    for make in (ol.galore, ol.adarankgrad):
        with pytest.raises(error, match=words):
            make(0.1, **options)


def test_two_policies_contradict_each_other():
    with pytest.raises(ValueError, match="`on_convergence` needs a number for `update_proj_gap`"):
        ol.adarankgrad(0.1, on_convergence=0.1, update_proj_gap=ol.every(10))
    ol.adarankgrad(
        0.1, on_convergence=0.1, update_proj_gap=10
    )  # less than the policy's own shortest gap
    with pytest.raises(ValueError, match="a seeded or DCT basis has a fixed rank"):
        ol.adarankgrad(0.1, fit=ol.dct())


# Ranks


def ranks(rank, side="short"):
    shapes = {
        "attention": {"query_proj": {"kernel": (64, 64)}},
        "mlp": {"up": {"kernel": (64, 200)}, "down": {"kernel": (200, 64)}},
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = low_rank_state(jax.eval_shape(ol.galore(0.1, rank=rank, side=side).init, params))
    return {path.split("/")[1]: leaf.basis.shape[-1] for path, leaf in state.leaves.items()}


def test_rank_is_a_number_a_share_or_a_dict():
    assert ranks(24) == {"query_proj": 24, "up": 24, "down": 24}
    assert ranks(0.25) == {"query_proj": 16, "up": 16, "down": 16}
    # 50 columns of 200 are rounded to a multiple of 8
    assert ranks(0.25, side="long") == {"query_proj": 16, "up": 48, "down": 48}
    mixed = ranks({"attention": 8, "up": 0.5, ".*": 4})
    assert mixed == {"query_proj": 8, "up": 32, "down": 4}
    # what no pattern matches has rank 128, and is dense here
    assert ranks({"attention": 8}) == {"query_proj": 8}


# Dense leaves


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dense_learning_rate_is_an_adam_of_its_own(weight_decay):
    """The same as `dense=optax.adamw(rate)`, schedules included; the matrices do not notice."""
    params, grads = normal_tree("mlp", seed=0), gradients("mlp", steps=3)
    rate = optax.linear_schedule(0.3, 0.1, 2)
    make = functools.partial(ol.galore, 0.01, weight_decay=weight_decay, b1=0.8, **SMALL)
    _, _, got = run(make(dense_learning_rate=rate), params, grads)
    adam = optax.adamw(rate, b1=0.8, weight_decay=weight_decay)
    _, _, want = run(make(dense=adam), params, grads)
    assert_trees_close(got, want, 1e-5)
    _, _, plain = run(make(), params, grads)
    assert_trees_close(
        [u["hidden"]["kernel"] for u in got], [u["hidden"]["kernel"] for u in plain], 1e-5
    )
    assert np.abs(got[0]["hidden"]["bias"] - plain[0]["hidden"]["bias"]).max() > 0.1


def test_injected_numbers_that_nobody_gave_ask_for_no_weights():
    tx = ol.inject_hyperparams(ol.galore)(0.1, rank=2)
    grads = {"kernel": jnp.ones((6, 8))}
    state = tx.init(grads)
    assert "weight_decay" not in state.hyperparams
    plain = ol.galore(0.1, rank=2)
    want, _ = plain.update(grads, plain.init(grads))
    assert_trees_close(tx.update(grads, state)[0], want, 1e-5)


@pytest.mark.parametrize("method", [ol.galore, ol.adarankgrad, ol.apollo])
def test_injected_float64_numbers_widen_no_state(method):
    with jax.enable_x64(True):
        params = {"kernel": jnp.ones((6, 8), jnp.float32), "bias": jnp.ones(8, jnp.float32)}
        tx = ol.inject_hyperparams(method)(0.1, rank=2)
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, state, params)
    kinds = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert kinds(after) == kinds(state)


@pytest.mark.parametrize("options", [{}, {"rotate_moments": True}, {"side": "both"}], ids=str)
def test_without_eps_rows_of_zeros_step_by_zero(options):
    """A gradient of rank one leaves a row of the coordinates zero."""
    G = {"kernel": jnp.outer(jnp.arange(1.0, 9), jnp.arange(1.0, 13))}
    tx = ol.galore(1.0, rank=2, eps=0.0, **options)
    _, state, updates = run(tx, G, [G, G])
    assert all(jnp.any(update["kernel"] != 0) for update in updates)
    assert ol.diagnostics(state)["kernel"].skips.tolist() == [0]
