"""Eight devices: the same updates as on one, and no array changes its place."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import optax_lowrank as ol

from .helpers import assert_trees_close

# Sharded sums are taken in another order, and a refit amplifies that.
TOLERANCE = 1e-3
SHAPES = {"up": (16, 24), "down": (24, 16), "both": (16, 16), "stack": (4, 16, 24), "bias": (24,)}
SPECS = {
    "up": P("x", None),
    "down": P("x", None),
    "both": P("y", "x"),
    "stack": P("x", None, "y"),
    "bias": P("y"),
}
OTHER_SIDE = SPECS | {"up": P(None, "y"), "down": P(None, "y"), "stack": P(None, "y", "x")}
FITS = {"svd": ol.svd(), "randomized_svd": ol.randomized_svd()}


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    """Two by four devices; explicit axes want the mesh set while a program is traced."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(request.param, request.param))
    with jax.set_mesh(mesh):
        yield mesh


def low_rank_data(seed):
    """Gradients with a gap after rank 3, so that both programs mean the same basis."""
    random = np.random.default_rng(seed)

    def leaf(*shape):
        noise = 0.01 * random.standard_normal(shape)
        if len(shape) == 1:
            return noise
        left, right = (
            random.standard_normal((*shape[:-1], 3)),
            random.standard_normal((*shape[:-2], 3, shape[-1])),
        )
        return left @ right + noise

    return {name: jnp.asarray(leaf(*shape), jnp.float32) for name, shape in SHAPES.items()}


GRADS = [low_rank_data(seed) for seed in range(4)]
PARAMS = low_rank_data(9)


def run(tx, params, grads):
    """Four updates, with a refit at the third."""
    update, state, history = jax.jit(tx.update), jax.jit(tx.init)(params), []
    for grad in grads:
        updates, state = update(grad, state, params)
        history.append(updates)
    return history, state


def galore(fit):
    return ol.galore(0.1, rank=3, update_proj_gap=2, weight_decay=0.01, fit=FITS[fit])


@pytest.fixture(scope="module")
def on_one_device():
    """Updates and last state, by fit, computed before any test enters a mesh."""
    return {fit: run(galore(fit), PARAMS, GRADS) for fit in FITS}


def gathered(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("mesh", [AxisType.Auto], ids=str, indirect=True)
def test_updates_are_those_of_one_device(on_one_device, mesh):
    shardings = {name: NamedSharding(mesh, spec) for name, spec in OTHER_SIDE.items()}
    params, grads = jax.device_put(PARAMS, shardings), [jax.device_put(g, shardings) for g in GRADS]
    history, state = run(galore("randomized_svd"), params, grads)
    want, want_state = on_one_device["randomized_svd"]
    assert_trees_close(gathered(history), gathered(want), TOLERANCE)
    assert_trees_close(
        gathered(ol.diagnostics(state)), gathered(ol.diagnostics(want_state)), TOLERANCE
    )
    for updates in history:
        for name, sharding in shardings.items():
            assert updates[name].sharding.is_equivalent_to(sharding, updates[name].ndim)


def test_state_stays_where_it_was_put(on_one_device, mesh):
    """Bases and moments split along one side; one trace for all steps."""
    tx, traces = galore("svd"), []
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}

    def place(x):
        if x.ndim != 3:  # not a basis, not a moment of coordinates
            return x
        spec = P(None, "y", None) if x.shape[1] % 4 == 0 else P(None, None, "y")
        return jax.device_put(x, NamedSharding(mesh, spec))

    params = jax.device_put(PARAMS, shardings)
    state = jax.tree.map(place, jax.jit(tx.init)(params))
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert len(split) >= 3 * 4  # at least P, M, V of four leaves
    before = jax.tree.map(lambda x: x.sharding, state)
    explicit = AxisType.Explicit in mesh.axis_types

    @functools.partial(jax.jit, out_shardings=None if explicit else (shardings, before))
    def step(grad, state):
        traces.append(1)
        return tx.update(grad, state, params)

    for grad, want in zip(GRADS, on_one_device["svd"][0], strict=True):
        updates, state = step(jax.device_put(grad, shardings), state)
        for (path, x), sharding in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(before), strict=True
        ):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), jax.tree_util.keystr(path)
        assert_trees_close(gathered(updates), gathered(want), TOLERANCE)
    assert len(traces) == 1


def exchanged(compiled):
    """Numbers in the largest operand of every collective of a compiled program."""
    found = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    shapes = [shape for kinds in found for shape in re.findall(r"\[([\d,]*)\]", kinds)]
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.parametrize(
    "make",
    [
        ol.fira,
        ol.natural_galore,
        functools.partial(ol.gradnormlorp, state_bits={"bits": 8, "min_size": 16}, basis_bits=8),
    ],
    ids=["fira", "natural_galore", "gradnormlorp_8bit"],
)
def test_no_collective_has_the_size_of_a_gradient(make):
    """Equal shapes, unlike shardings: what meets in one program at a refit are products, not gradients."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"up": (64, 96), "down": (96, 64)}
    shardings = {name: NamedSharding(mesh, P("x", "y")) for name in shapes}
    on = lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = {
        name: on(shardings[name], jax.ShapeDtypeStruct(shape, jnp.float32))
        for name, shape in shapes.items()
    }
    tx = make(0.1, rank=4)
    places = ol.state_shardings(tx, params, shardings)
    state = jax.tree.map(on, places, jax.eval_shape(tx.init, params))
    update = jax.jit(tx.update, out_shardings=(shardings, places))
    # a gradient's quarter, which is what each device has of one axis, has 1536 numbers; the history 4 r n = 1536
    assert 0 < max(exchanged(update.lower(params, state, params).compile())) < 1536


@pytest.mark.parametrize(
    ("make", "whole"),
    [
        (functools.partial(ol.galore, weight_decay=0.1), False),
        (functools.partial(ol.gradnormlorp, fit=ol.subspace_iteration()), False),
        (ol.fira, True),
    ],
    ids=["galore", "gradnormlorp", "fira"],
)
def test_gradients_that_differ_by_device(make, whole):
    """The steps of their mean; what is averaged are coordinates and sketches."""
    random = np.random.default_rng(0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"stack": (2, 32, 48), "down": (48, 32), "bias": (32,)}
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    params = {name: draw(*shape) for name, shape in shapes.items()}
    grads = [
        {name: draw(8, *shape) + 3 * draw(1, *shape) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    options = {"rank": 4, "update_proj_gap": 2}
    tx, alone = make(0.1, axis_name="data", **options), make(0.1, **options)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=(P(), P())
    )
    def update(grads, state, params):
        return tx.update(jax.tree.map(lambda x: x[0], grads), state, params)

    update = update.lower(grads[0], tx.init(params), params).compile()
    largest = max(exchanged(update))
    assert largest == 2 * 32 * 48 if whole else largest < 32 * 48 / 2
    state, state_alone, on_one = tx.init(params), alone.init(params), jax.jit(alone.update)
    for of_devices in grads:
        mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), of_devices)
        updates, state = update(of_devices, state, params)
        want, state_alone = on_one(mean, state_alone, params)
        assert_trees_close(updates, want, rtol=TOLERANCE)


@pytest.mark.parametrize("make", [ol.galore, ol.fira, ol.gradnormlorp, ol.low_rank_muon])
def test_bfloat16_gradients_that_differ_by_device(make):
    """Traced: what is averaged is the same on all devices, and so are updates and state."""
    # of no platform: all branches must agree
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = {"stack": (2, 32, 48), "down": (48, 32)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    tx = make(0.1, rank=4, state_bits=8, axis_name="data")

    def update(grads, state, params):
        grads = jax.lax.pcast(grads, "data", to="varying")
        return tx.update(grads, state, params)

    state = jax.eval_shape(tx.init, params)
    everywhere = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=P(), out_specs=P()))
    assert jax.eval_shape(everywhere, params, state, params) == (params, state)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (functools.partial(ol.fira, fit=ol.subspace_iteration()), AxisType.Auto),
        (ol.gradnormlorp, AxisType.Auto),
        (ol.gradnormlorp, AxisType.Explicit),
    ],
    ids=["fira", "gradnormlorp", "explicit"],
)
def test_stack_that_is_split_along_its_layers(make, kind):
    """In a `shard_map` each device fits its own layers, whose sides another mesh axis may divide."""
    random = np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("stage", "model"), axis_types=(kind, kind))
    shapes = {"up": (8, 32, 48), "down": (8, 64, 32)}
    trees = [
        {
            name: jnp.asarray(random.standard_normal(shape), jnp.float32)
            for name, shape in shapes.items()
        }
        for _ in range(4)
    ]
    of_stage = lambda tree, stage: jax.tree.map(lambda x: x[2 * stage : 2 * stage + 2], tree)
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, P("stage", None, "model")))
    axes = {name: ol.MatrixAxes(-2, -1) for name in shapes}
    tx = make(0.1, rank=4, update_proj_gap=2, weight_dimension_numbers=axes)
    specs = jax.tree.map(lambda x: P("stage") if x.ndim else P(), jax.eval_shape(tx.init, trees[0]))
    stages = functools.partial(jax.shard_map, mesh=mesh, axis_names={"stage"})
    init = stages(tx.init, in_specs=P("stage"), out_specs=specs)
    update = stages(
        tx.update, in_specs=(P("stage"), specs, P("stage")), out_specs=(P("stage"), specs)
    )
    params, state = place(trees[0]), jax.jit(init)(place(trees[0]))
    placed = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(update, out_shardings=(None, placed)).lower(params, state, params).compile()
    # what leaves a `shard_map` with an explicit axis beside it JAX gathers
    if kind == AxisType.Auto:
        assert max(exchanged(update)) < 64 * 32 / 2
    alone, on_one = [tx.init(of_stage(trees[0], stage)) for stage in range(4)], jax.jit(tx.update)
    for grads in trees[1:]:
        updates, state = update(place(grads), state, params)
        got = jax.device_get(updates)
        for stage in range(4):
            own = of_stage(grads, stage), alone[stage], of_stage(trees[0], stage)
            want, alone[stage] = on_one(*own)
            assert_trees_close(of_stage(got, stage), want, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_nnx_optimizer_with_sharding_metadata(kind):
    """Neither a rank that no mesh axis divides nor the kernel's metadata gets in the way."""

    class Model(nnx.Module):
        def __init__(self, names):
            init = nnx.initializers.normal()
            init = nnx.with_partitioning(init, names) if names else init
            self.up = nnx.Linear(16, 24, kernel_init=init, rngs=nnx.Rngs(0))

    def train(names):
        model = Model(names)
        optimizer = nnx.Optimizer(model, galore("svd"), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, grads):
            optimizer.update(model, grads)

        grads = nnx.state(model, nnx.Param)
        for grad in GRADS:
            grads = jax.tree.map(lambda x: x, grads)
            kernel, bias = grads["up"]["kernel"], grads["up"]["bias"]
            kernel.set_value(jax.device_put(grad["up"], kernel.get_value().sharding))
            bias.set_value(jax.device_put(grad["bias"], bias.get_value().sharding))
            step(model, optimizer, grads)
        return model, optimizer

    want, _ = train(None)
    with jax.set_mesh(jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))):
        model, optimizer = train(("x", "y"))
        kernel = model.up.kernel.get_value()
    assert not kernel.sharding.is_fully_replicated
    np.testing.assert_allclose(
        np.asarray(kernel), np.asarray(want.up.kernel.get_value()), rtol=0, atol=TOLERANCE
    )
    assert ol.diagnostics(optimizer.opt_state)["up/kernel"].rank.tolist() == [3]


def test_state_shardings(mesh):
    """The state starts on the devices of its parameter's axes, and a step leaves it there."""
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params, grads = (jax.device_put(tree, shardings) for tree in (PARAMS, GRADS[0]))
    tx = ol.fira(0.01, rank=4, fit=ol.svd())
    places = ol.state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=places)(params)
    core = state[0].inner_states["matrix"].inner_state
    leaves = core.leaves
    # a (16, 24) kernel is projected on axis 0, and so is the square one; "down" on axis 1, which lies everywhere
    assert {path: leaf.basis.sharding.spec for path, leaf in leaves.items()} == {
        "up": P(None, "x", None),
        "down": P(None, None, None),
        "both": P(None, "y", None),
        "stack": P("x", None, None),
    }
    assert {path: leaf.rule.moments.mu.sharding.spec for path, leaf in leaves.items()} == {
        "up": P(None, None, None),
        "down": P(None, None, "x"),
        "both": P(None, None, "x"),
        "stack": P("x", None, "y"),
    }
    updates, after = jax.jit(tx.update)(grads, state, params)
    one_device, _ = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
    assert_trees_close(jax.device_get(updates), jax.device_get(one_device), rtol=TOLERANCE)
    if mesh.axis_types[0] == AxisType.Explicit:
        stayed = jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim),
            state[0].inner_states["matrix"],
            after[0].inner_states["matrix"],
        )
        assert all(jax.tree.leaves(stayed))


def test_spread_state_has_no_copies():
    """Each device holds its part of every array that divides, and steps are as before."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params, grads = (jax.device_put(tree, shardings) for tree in (PARAMS, GRADS[0]))
    tx = ol.galore(0.01, rank=4, fit=ol.svd())
    places = ol.state_shardings(tx, params, shardings, spread=True)
    state = jax.jit(tx.init, out_shardings=places)(params)
    leaves = state.direction.inner_states["matrix"].inner_state.leaves
    assert {path: leaf.basis.sharding.spec for path, leaf in leaves.items()} == {
        "up": P(None, "x", None),
        "down": P(None, "x", None),  # of axis 1, which the parameter does not split
        "both": P(None, "y", "x"),
        "stack": P("x", "y", None),
    }
    assert leaves["up"].rule.mu.sharding.spec == P(None, None, "x")
    updates, _ = jax.jit(tx.update, out_shardings=(shardings, places))(grads, state, params)
    one_device, _ = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
    assert_trees_close(jax.device_get(updates), jax.device_get(one_device), rtol=TOLERANCE)


def test_state_shardings_of_large_and_awkward_arrays():
    """A Fisher history, codes and their scales, two sides, names of layers that are those of state fields."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = {
        name: jax.ShapeDtypeStruct((16, 24), jnp.float32) for name in ("mu", "w", "basis", "rule")
    }
    params |= {"nu": jax.ShapeDtypeStruct((24,), jnp.float32)}
    along = {name: NamedSharding(mesh, P("x", "y")) for name in params}
    along["nu"] = NamedSharding(mesh, P("y"))

    def specs(tx):
        state = ol.state_shardings(tx, params, along)
        assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, params))
        parts = state.direction.inner_states
        dense = [x.spec for x in jax.tree.leaves(parts["dense"]) if x.spec != P()]
        leaves = parts["matrix"].inner_state.leaves
        found = [jax.tree.map(lambda x: x.spec, leaf) for leaf in leaves.values()]
        assert all(leaf == found[0] for leaf in found)
        return found[0], dense

    leaf, dense = specs(ol.natural_galore(0.01, rank=4, history=2))
    assert leaf.basis == P(None, "x", None)
    assert leaf.rule[0].history == P(None, None, None, "y")
    assert (leaf.rule[1].mu, leaf.rule[1].nu) == (P(None, None, "y"), P(None, None, "y"))
    assert dense == [P("y"), P("y")]

    leaf, dense = specs(ol.galore(0.01, rank=4, state_bits={"bits": 8, "min_size": 16}))
    assert leaf.rule.inner.mu == P(None, None, "y")
    assert leaf.rule.block_scale["mu"] == P(None, None, None)
    assert dense == [P("y"), P("y")]

    leaf, _ = specs(ol.gradnormlorp(0.01, rank=4))
    assert leaf.basis == (P(None, "x", None), P(None, "y", None))
    assert leaf.rule.mu == P(None, None, None)
    assert leaf.geometry.mu == P(None, None, "y")


def test_accumulation_keeps_places_on_an_explicit_mesh():
    """Four micro-batches in two windows."""
    tx = ol.galore(0.1, rank=3, update_proj_gap=1, fit=FITS["svd"], accumulate=2)
    want, _ = run(tx, PARAMS, GRADS)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        params = jax.device_put(PARAMS, shardings)
        history, _ = run(tx, params, [jax.device_put(g, shardings) for g in GRADS])
    assert_trees_close(gathered(history), gathered(want), TOLERANCE)
    for name, sharding in shardings.items():
        assert history[-1][name].sharding.is_equivalent_to(sharding, history[-1][name].ndim)


def test_state_shardings_wants_a_mesh():
    kernel = {"kernel": jnp.ones((16, 24))}
    along = jax.tree.map(lambda x: x.sharding, kernel)
    with pytest.raises(TypeError, match=r"NamedSharding.*'kernel'"):
        ol.state_shardings(ol.galore(0.01, rank=4), kernel, along)


def test_state_shardings_wants_one_for_each_parameter(mesh):
    with pytest.raises(ValueError, match="like `params`"):
        ol.state_shardings(ol.galore(0.01, rank=4), PARAMS, {"up": NamedSharding(mesh, P())})


OUTSIDE = {  # of the core, and what is injected into it
    "codes": lambda: ol.galore(0.1, rank=3, state_bits={"min_size": 16, "block_size": 8}),
    "codes of an embedding": lambda: ol.galore(0.1, rank=3, state_bits={"bits": 4, "min_size": 16}),
    "quantize_state": lambda: ol.quantize_state(optax.scale_by_adam(), min_size=16, block_size=8),
    "orthogonalize": ol.orthogonalize,
    "scale_by_woodbury_fisher": lambda: ol.scale_by_woodbury_fisher(history=2),
    "inject_hyperparams": lambda: ol.inject_hyperparams(ol.galore)(0.1, rank=3),
    "extra arguments": lambda: optax.chain(
        ol.galore(0.1, rank=3), optax.contrib.reduce_on_plateau()
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_rest_of_the_library_on_a_mesh(name, mesh):
    """Two updates, in and outside of jit; they lie as the gradients do."""
    tx = OUTSIDE[name]()
    specs = {"kernel": P(None, "y"), "embedding": P("y", "x")}
    grads = {"kernel": jnp.ones((16, 24)), "embedding": jnp.ones((32, 16))}
    grads = jax.device_put(grads, {path: NamedSharding(mesh, specs[path]) for path in specs})
    extra = {"value": jnp.sum(grads["kernel"])} if name == "extra arguments" else {}
    state = jax.jit(tx.init)(grads)
    for update in (jax.jit(tx.update), tx.update):
        updates, state = update(grads, state, grads, **extra)
    for path, x in updates.items():
        assert bool(jnp.all(jnp.isfinite(x)))
        assert x.sharding.is_equivalent_to(grads[path].sharding, 2)


@pytest.mark.parametrize(
    ("shape", "spec", "options", "basis", "moments"),
    [
        ((24, 12), P("x", None), {}, P(None, None, None), P(None, None, "x")),
        ((12, 24), P(None, "x"), {"side": "long"}, P(None, "x", None), P(None, None, None)),
        (
            (16, 64),
            P("x", None),
            {"side": "both", "rank": 8},
            P(None, "x", None),
            P(None, None, None),
        ),
    ],
)
def test_state_shardings_of_a_side_twice_as_long(mesh, shape, spec, options, basis, moments):
    """Of all but 4-bit codes, half a side is none; nor is a rank that is as long as one."""
    tx, params = ol.galore(0.1, **{"rank": 4, **options}), {"kernel": jnp.ones(shape)}
    shardings = ol.state_shardings(tx, params, {"kernel": NamedSharding(mesh, spec)})
    leaf = shardings.direction.inner_states["matrix"].inner_state.leaves["kernel"]
    assert jax.tree.leaves(leaf.basis)[0].spec == basis
    assert leaf.rule.mu.spec == moments
    jax.block_until_ready(jax.jit(tx.init, out_shardings=shardings)(params))


@pytest.mark.parametrize("make", [ol.galore, ol.fira, ol.gradnormlorp])
def test_state_shardings_of_a_side_whose_bytes_a_mesh_does_not_divide(make):
    """Four devices take three columns each, and cannot share the six bytes of two 4-bit codes."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    along = {"kernel": NamedSharding(mesh, P(None, "x"))}
    params = jax.device_put({"kernel": jnp.ones((8, 12))}, along)
    tx = make(0.1, rank=4, state_bits={"bits": 4, "min_size": 1})
    shardings = ol.state_shardings(tx, params, along)
    jax.block_until_ready(jax.jit(tx.init, out_shardings=shardings)(params))


@pytest.mark.parametrize("options", [{}, {"side": "both"}], ids=str)
def test_resize_of_a_spread_state(mesh, options):
    """An axis that a mesh no longer divides is whole again; what grows lies as before."""
    tx = ol.galore(0.1, rank=8, **options)
    params = {"kernel": jnp.ones((16, 24))}
    along = {"kernel": NamedSharding(mesh, P(None, "y"))}
    shardings = ol.state_shardings(tx, params, along, spread=True)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    params = jax.device_put(params, along)
    for rank in (3, 8):
        state = ol.resize(tx, state, params, rank)
        _, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))
