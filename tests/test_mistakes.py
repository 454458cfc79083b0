"""Mistakes: each is told in the factory or at `init` by the name of the argument or leaf, what is wrong, what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

import optax_lowrank as ol
from optax_lowrank.checks import trusted

from .helpers import assert_trees_equal

PARAMS = {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)}
TRANSPOSED = PARAMS | {"kernel": jnp.ones((8, 12))}
WIDER = PARAMS | {"kernel": jnp.ones((12, 9))}
SCHEDULE = optax.constant_schedule(0.1)
galore = functools.partial(ol.galore, 0.1, rank=2)
fira, muon = functools.partial(ol.fira, 0.1, rank=2), functools.partial(ol.low_rank_muon, 0.1)
TX = galore()
STATE = jax.eval_shape(TX.init, PARAMS)
STACK = jax.eval_shape(
    jax.vmap(TX.init), {"kernel": jnp.ones((3, 12, 8)), "bias": jnp.ones((3, 8))}
)


def assembled(**options):
    return ol.assemble(ol.low_rank(optax.scale_by_adam(), rank=2), 0.1, rank=2, **options)


def init(tx, params=PARAMS):
    return jax.eval_shape(tx.init, params)


def update(grads, state=STATE, params=None):
    return jax.eval_shape(TX.update, grads, state, params)


MISTAKES = [
    # numbers
    ("text for a rate", lambda: ol.galore("1e-2"), TypeError,
     r"`learning_rate` must be a number or a schedule, got '1e-2'. Give"),
    ("no rate", lambda: ol.fira(None), TypeError,
     r"`learning_rate` must be a number or a schedule, got None. Give a float"),
    ("negative rate", lambda: ol.apollo(-0.1), ValueError, r"`learning_rate` must not be negative, got -0\.1"),
    ("rate that is no number", lambda: ol.galore(float("nan")), ValueError,
     "`learning_rate` must not be negative, got nan"),
    ("what makes schedules", lambda: ol.galore(optax.cosine_decay_schedule), TypeError,
     r"`learning_rate`.*got `cosine_decay_schedule`.*must be called"),
    ("the same, of one argument", lambda: ol.galore(optax.constant_schedule), TypeError,
     r"`learning_rate`.*must be called: `learning_rate=optax"),
    ("rates for each entry", lambda: ol.galore(jnp.ones(3)), TypeError, r"`learning_rate` must be .*scalar array"),
    ("dense rate", lambda: galore(dense_learning_rate="fast"), TypeError,
     r"`dense_learning_rate` must be a number or a schedule, got 'fast'"),
    ("schedule of the scale", lambda: galore(scale=SCHEDULE), TypeError,
     r"`scale` must be a number.*inject_hyperparams\(optimizer\)\(\.\.\., scale=schedule\)"),
    ("schedule of the decay", lambda: galore(weight_decay=SCHEDULE), TypeError,
     "`weight_decay` must be a number.*inject_hyperparams"),
    ("schedule of the limit", lambda: fira(limit=SCHEDULE), TypeError, "`limit` must be a number.*inject_hyperparams"),
    ("schedule of the damping", lambda: ol.natural_galore(0.1, damping=SCHEDULE), TypeError,
     "`damping` must be a number.*inject_hyperparams"),
    ("text for b1", lambda: galore(b1="x"), TypeError, "`b1` must be a number, got 'x'. Give a float"),
    ("b1 of Adam", lambda: galore(b1=2.0), ValueError, r"`b1` must be in \[0, 1\), got 2\.0"),
    ("b2 of 1", lambda: galore(b2=np.float32(1)), ValueError, r"`b2` must be in \[0, 1\), got 1\.0"),
    ("eps", lambda: galore(eps=-1e-08), ValueError, "`eps` must not be negative, got -1e-08"),
    ("decay", lambda: galore(weight_decay=-0.1), ValueError, r"`weight_decay` must not be negative, got -0\.1"),
    ("scale uphill", lambda: fira(scale=-0.25), ValueError, r"`scale` must not be negative, got -0\.25"),
    ("bool for a number", lambda: galore(scale=True), TypeError, "`scale` must be a number, got True"),
    ("beta", lambda: muon(beta=1), ValueError, r"`beta` must be in \[0, 1\), got 1"),
    ("argument of codes", lambda: fira(state_bits={"bit": 8}), TypeError,
     "`state_bits` has arguments of `quantize_state`, and 'bit' is none"),
    ("steps of Newton", lambda: muon(ns_steps=0), ValueError, "`ns_steps` must be positive, got 0"),
    ("residual scale", lambda: fira(residual_scale="1"), TypeError, "`residual_scale` must be a number, got '1'"),
    ("energy", lambda: ol.adarankgrad(0.1, max_residual_energy=30), ValueError,
     r"`max_residual_energy` must be in \[0, 1\], got 30"),
    ("threshold", lambda: ol.adarankgrad(0.1, on_convergence=10), ValueError,
     r"`threshold` must be in \[0, 1\], got 10"),
    ("seed", lambda: galore(seed=0.5), TypeError, r"`seed` must be an int, got 0\.5"),
    ("dtype", lambda: galore(mu_dtype="f99"), TypeError,
     "`mu_dtype` must be a dtype of floats, as `jnp.bfloat16`, got 'f99'"),
    ("dtype of ints", lambda: galore(mu_dtype=jnp.int8), TypeError, "`mu_dtype` must be a dtype of floats.*got `int8`"),
    ("dtype of the history", lambda: ol.natural_galore(0.1, history_dtype=jnp.int32), TypeError,
     "`history_dtype` must be a dtype of floats"),
    # ranks
    ("text for a rank", lambda: ol.galore(0.1, rank="8"), TypeError,
     r"`rank` must be an int, got '8'.*a share .* in \(0, 1\)"),
    ("schedule of the rank", lambda: ol.galore(0.1, rank=SCHEDULE), TypeError,
     "`rank` must be an int, got `<lambda>`.*dict {regex"),
    ("rank of 0 of NumPy", lambda: ol.galore(0.1, rank=np.int64(0)), ValueError, "`rank` must be positive, got 0"),
    ("rank by a path that is not", lambda: ol.galore(0.1, rank={"attn": 8}).init(PARAMS), ValueError,
     "patterns of `rank` 'attn' match no matrix. The paths: 'kernel'"),
    ("adapter's rank", lambda: ol.adapters.init(PARAMS, rank=0.5), TypeError, r"`rank` must be an int, got 0\.5"),
    # functions
    ("fit not called", lambda: galore(fit=ol.svd), TypeError, r"`fit` must be called: `fit=svd\(\)`"),
    ("function that is no fit", lambda: galore(fit=lambda G: G), TypeError,
     r"`fit` must be a fit such as `svd\(\)`.*no `\(key, G, P\) -> P`"),
    ("policy not called", lambda: galore(update_proj_gap=ol.every), TypeError,
     "`update_proj_gap` must be .*got `every`.*`every` must be called"),
    ("schedule of the gap", lambda: galore(update_proj_gap=SCHEDULE), TypeError,
     "`update_proj_gap` must be .*schedules go through `inject_hyperparams"),
    ("fraction of a gap", lambda: galore(update_proj_gap=0.5), TypeError,
     r"`update_proj_gap` must be a number of updates .*got 0\.5"),
    ("text for a gap", lambda: ol.every("often"), TypeError, "`n` must be a number, got 'often'"),
    ("no gap", lambda: galore(update_proj_gap=np.int64(0)), ValueError,
     "`update_proj_gap`.*must be a positive number of updates, got 0"),
    ("inject around an optimizer", lambda: ol.inject_hyperparams(TX), TypeError,
     r"`factory` must be what makes an optimizer.*`inject_hyperparams\(fira\)\("),
    # names
    ("misspelt", lambda: ol.galore(0.1, rnk=8), TypeError, r"`galore` has no argument `rnk`\. Did you mean `rank`\?"),
    ("the core's name", lambda: ol.galore(0.1, refresh=8), TypeError,
     "no argument `refresh`. Did you mean `update_proj_gap`"),
    ("misspelt, injected", lambda: ol.inject_hyperparams(ol.fira)(0.1, limt=2.0), TypeError,
     "`fira` has no argument `limt`. Did you mean `limit`"),
    # transformations
    ("rate for dense", lambda: galore(dense=0.001), TypeError,
     r"`dense` must be an Optax transformation, got 0\.001.*`dense_learning_rate=1e-3`"),
    ("dense not called", lambda: galore(dense=optax.adam), TypeError,
     r"`dense` must be an Optax transformation, got `adam`\. `optax\.adam\(1e-3\)`"),
    ("dense uphill", lambda: init(galore(dense=optax.scale_by_adam())), ValueError,
     "`dense` must be a complete optimizer, and goes uphill.*Give `optax.adam"),
    ("dense uphill in `assemble`", lambda: init(assembled(dense=optax.identity())), ValueError,
     "`dense` must be a complete optimizer, and goes uphill"),
    ("inner downhill", lambda: init(assembled(inner=optax.adam(0.001))), ValueError,
     "`inner` must be a direction, and goes downhill.*Give `optax.scale_by_adam"),
    ("base downhill", lambda: init(galore(base_optimizer=optax.sgd(0.1))), ValueError,
     "`base_optimizer` must be a direction.*has a learning rate"),
    ("base not called", lambda: galore(base_optimizer=optax.adam), TypeError,
     r"`base_optimizer` must be an Optax transformation.*Call it: `optax\.scale_by_lion"),
    ("rule not called", lambda: ol.low_rank(optax.scale_by_adam, rank=2), TypeError,
     "needs a `Rule` or an Optax transformation, got `scale_by_adam`. Call what"),
    ("matrix", lambda: ol.assemble(ol.low_rank, 0.1, rank=2), TypeError,
     "`matrix` must be an Optax transformation, got `low_rank`. Call"),
    ("two ways for dense", lambda: galore(dense=optax.sgd(0.1), dense_learning_rate=0.1), ValueError,
     "`dense` or `dense_learning_rate`, not both"),
    # trees
    ("optimizer for parameters", lambda: TX.init(TX), TypeError,
     r"`params` must be arrays or their shapes; leaf 'init' is .*nnx\.Param"),
    ("numbers for parameters", lambda: TX.init({"w": 1.0}), TypeError,
     r"`params` must be arrays or their shapes; leaf 'w' is 1\.0"),
    ("text for a mask", lambda: init(galore(mask="bias")), TypeError,
     "`mask` must be a tree of bools like the parameters, or a function of them; it has 'bias'"),
    ("mask of another tree", lambda: init(galore(mask={"kernel": True}, weight_decay=0.1)), ValueError,
     "`mask` must be a tree of bools like the parameters.*kernel"),
    ("pair for axes", lambda: init(galore(weight_dimension_numbers={"kernel": (0, 1)})), ValueError,
     r"override of leaf 'kernel' is \(0, 1\); give MatrixAxes or None, as `MatrixAxes\(0, 1\)`"),
    ("axes of no leaf", lambda: init(galore(weight_dimension_numbers={"attn": None})), ValueError,
     "'attn' match no leaf. The paths: 'bias', 'kernel'"),
    ("axes of a vector", lambda: init(galore(weight_dimension_numbers={"bias": ol.MatrixAxes(0, 1)})), ValueError,
     r"leaf 'bias' of shape \(8,\).*or None to leave the leaf dense"),
    ("ints", lambda: init(TX, {"kernel": jnp.ones((12, 8), int)}), TypeError, "leaf 'kernel' is int32"),
    ("leaf without a view", lambda: init(ol.low_rank(optax.identity(), rank=2)), ValueError,
     "no matrix view for leaf 'bias'.*assemble"),
    # gradients and states
    ("gradient transposed", lambda: update(TRANSPOSED, params=PARAMS), ValueError,
     r"gradient of leaf 'kernel' is \(8, 12\), the parameter \(12, 8\)\. Call `update` with"),
    ("gradient missing", lambda: update({"kernel": PARAMS["kernel"]}, params=PARAMS), ValueError,
     r"gradient of leaf 'bias' is missing, the parameter \(8,\)"),
    ("gradient of another size", lambda: update(WIDER), ValueError,
     r"bases are \[\(1, 8, 2\)\], and should be \[\(1, 9, 2\)\]. It is leaf 'kernel' of shape \(12, 9\)"),
    ("gradient that is longer", lambda: update(PARAMS | {"kernel": jnp.ones((13, 8))}), TypeError,
     r"leaf 'kernel' of shape \(13, 8\).*`init`.*`abstract_state"),
    ("gradients of another tree", lambda: update({"kernel": PARAMS["kernel"]}), ValueError,
     "`update` takes gradients of the parameters that `init` was called for"),
    ("arguments of `update` swapped", lambda: update(STATE, PARAMS), TypeError,
     "`state` must be what `tx.init` makes, .*got a `dict`. It is the second argument"),
    ("state as dicts", lambda: update(PARAMS, {"count": 0, "direction": {}}), TypeError,
     r"`state` must be .*a checkpoint is restored into `abstract_state\(tx, params, metadata\)`"),
    ("moments of another rank", lambda: update(PARAMS, other_ranks()), TypeError,
     r"leaf 'kernel' of shape \(12, 8\).*from after `compact` is restored into `abstract_state"),
    ("no mesh", lambda: galore(axis_name="data").update(PARAMS, TX.init(PARAMS)), NameError,
     r"`axis_name='data'` is no axis here: call `update` inside of `jax\.shard_map`"),
    # reports
    ("diagnostics of parameters", lambda: ol.diagnostics(PARAMS), TypeError,
     r"`state` must be what `tx\.init` makes, .*got a `dict`"),
    ("diagnostics of an optimizer", lambda: ol.diagnostics(TX), TypeError,
     "`state` must be what `tx.init` makes, .*got a `GradientTransformation"),
    ("diagnostics of a stack", lambda: jax.eval_shape(ol.diagnostics, STACK), ValueError,
     r"`state` is a stack of 3: `jax\.vmap\(diagnostics\)\(state\)`"),
    ("compact, parameters", lambda: ol.compact(TX, PARAMS, PARAMS), ValueError,
     "no state of `tx` for these `params`: 'bias' is .*belong together"),
    ("compact, swapped", lambda: ol.compact(STATE, TX, PARAMS), TypeError,
     r"`tx` must be an Optax transformation, got a `OptimizerState`. It comes first"),
    ("compact, a stack", lambda: ol.compact(TX, STACK, PARAMS), ValueError,
     r"no state of `tx` for these `params`: .* is \(3,\), where `tx` has \(\)"),
    ("resize, unknown leaf", lambda: ol.resize(TX, STATE, PARAMS, {"attn": 1}), ValueError,
     r"`rank` names 'attn', which has no basis. There are \['kernel'\]"),
    ("memory report, swapped", lambda: ol.memory_report(PARAMS, TX), TypeError,
     r"`tx` must be an Optax transformation, got a `dict`. The order is `memory_report\(tx, params\)`"),
    ("describe an optimizer", lambda: ol.describe(TX), TypeError,
     "`params` must be parameters, got an optimizer: give `params, rank"),
    ("plan an optimizer", lambda: ol.plan(TX, "24GB"), TypeError,
     "`params` must be arrays or their shapes; leaf 'init'"),
    ("budget", lambda: ol.plan(PARAMS, None), ValueError,
     '`budget` must be bytes or a text such as "24GB" or "80GiB", got None'),
]  # fmt: skip


def other_ranks():
    """A state whose moments have another rank than its bases."""
    rank = lambda r: low_rank_part(jax.eval_shape(ol.galore(0.1, rank=r).init, PARAMS))
    mixed = rank(2)["kernel"]._replace(rule=rank(4)["kernel"].rule)
    is_leaf = lambda x: x is low_rank_part(STATE)["kernel"]
    return jax.tree.map(lambda x: mixed if is_leaf(x) else x, STATE, is_leaf=is_leaf)


def low_rank_part(state):
    return state.direction.inner_states["matrix"].inner_state.leaves


@pytest.mark.parametrize(
    ("call", "error", "words"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_mistake(call, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_nothing_to_project():
    with pytest.warns(UserWarning, match="no leaf is projected.*\n.*\n.*min.m, n. <= rank"):
        init(ol.galore(0.1, rank=64), {"kernel": jnp.ones((12, 8))})


# What is no mistake


def test_numbers_of_numpy():
    """A rank of NumPy is an int, a share or a value of a dict, wherever a rank is."""
    for numpys, pythons in [
        (np.int64(2), 2),
        (np.float32(0.5), 0.5),
        ({"kernel": np.uint8(3)}, {"kernel": 3}),
    ]:
        states = [
            ol.galore(np.float64(0.1), rank=rank).init({"kernel": jnp.ones((32, 24))})
            for rank in (numpys, pythons)
        ]
        assert_trees_equal(*states)
    two = np.int64(2)
    tx = ol.galore(
        0.1, rank=two, accumulate=two, update_proj_gap=two, seed=two, state_bits=np.int64(8)
    )
    state = jax.eval_shape(tx.init, PARAMS)
    updates, _ = jax.eval_shape(tx.update, PARAMS, state)
    assert updates["kernel"].shape == (12, 8)
    smaller = ol.resize(tx, state, PARAMS, np.int64(1))
    assert low_rank_part(smaller)["kernel"].basis.shape == (1, 8, 1)
    assert ol.describe(PARAMS, rank=two) == ol.describe(PARAMS, rank=2)
    assert ol.plan(PARAMS, 1e6, ranks=[two]).rows == ol.plan(PARAMS, 10**6, ranks=[2]).rows
    assert ol.adapters.init(PARAMS, two)["kernel"]["I"].shape == (12, 2)
    assert muon(rank=two, ns_steps=two).init(PARAMS)
    assert ol.natural_galore(0.1, rank=two, history=two).init(PARAMS)
    assert ol.adarankgrad(
        0.1, rank=two, min_rank=two, on_convergence=0.5, update_proj_gap=two
    ).init(PARAMS)


DENSE = {
    "adamw with warmup": lambda: optax.adamw(optax.linear_schedule(0.0, 0.1, 9), weight_decay=9.0),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1)),
    "noisy": lambda: optax.chain(optax.add_noise(99.0, 0.0, key=0), optax.scale(-1e-3)),
    "micro-batches": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "frozen": optax.set_to_zero,
    "reads the loss": optax.polyak_sgd,
    "searches": optax.lbfgs,
    "by name": lambda: optax.partition({"a": optax.sgd(0.1)}, {"kernel": "a", "bias": "a"}),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_that_is_right(name):
    init(galore(dense=DENSE[name]()))


@pytest.mark.parametrize(
    "inner", [optax.scale_by_lion(), optax.trace(0.9), optax.identity(), optax.scale_by_sm3()]
)
def test_direction_that_is_right(inner):
    init(galore(base_optimizer=inner, state_bits=8))


def test_wherever_init_is_called():
    """What steps of `dense` are tried on is no part of the program, nor of the devices around it."""
    right, wrong = (galore(dense=tx) for tx in (optax.sgd(0.1), optax.identity()))
    unasked = galore(dense=trusted(optax.sgd(0.1)))
    assert str(jax.make_jaxpr(right.init)(PARAMS)) == str(jax.make_jaxpr(unasked.init)(PARAMS))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = PartitionSpec()
    sharded = jax.shard_map(right.init, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    jax.eval_shape(sharded, PARAMS)  # where nothing is run outside of the mesh, and nobody asks
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    contexts = [
        lambda: jax.transfer_guard("disallow"),
        jax.disable_jit,
        lambda: jax.enable_x64(True),
        lambda: jax.debug_nans(True),
        lambda: jax.set_mesh(mesh),
    ]
    for context in contexts:
        with context():
            init(right)
            with pytest.raises(ValueError, match="uphill"):
                init(wrong)
    for way in (lambda tx: jax.eval_shape(jax.vmap(tx.init), stack), lambda tx: tx.init(PARAMS)):
        way(right)
        with pytest.raises(ValueError, match="uphill"):
            way(wrong)


def test_checkpoint_is_restored_as_it_is_saved(tmp_path):
    """One way for every state; Orbax refuses the shapes of `tx.init` after `compact`."""
    tx = ol.galore(0.1, rank=4)
    for step, state in enumerate([tx.init(PARAMS), ol.resize(tx, tx.init(PARAMS), PARAMS, 2)]):
        with ocp.CheckpointManager(tmp_path / str(step)) as manager:
            manager.save(step, args=ocp.args.StandardSave((PARAMS, state)))
        handler = ocp.StandardCheckpointHandler()
        with ocp.CheckpointManager(tmp_path / str(step), item_handlers=handler) as manager:
            shapes = ol.abstract_state(tx, PARAMS, manager.item_metadata(step)[1])
            target = ocp.args.StandardRestore((PARAMS, shapes))
            _, restored = manager.restore(step, args=target)
            assert_trees_equal(restored, state)
            with pytest.raises(TypeError, match="`abstract_state"):
                tx.update(PARAMS, manager.restore(step)[1], PARAMS)
