"""What a user may rely on: any finite gradient, any name of a layer, any number, any device."""

import collections
import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.sharding import AxisType, PartitionSpec as P

import optax_lowrank as ol
from optax_lowrank.rules import OfRuleState

from .helpers import (
    OPTIMIZERS,
    assert_trees_close,
    assert_trees_equal,
    compiled_step,
    low_rank_state,
    normal_tree,
    run,
)

every_row = pytest.mark.parametrize("row", OPTIMIZERS)


@functools.cache
def exact(row):
    """An optimizer whose bases are a function of the gradient alone."""
    return OPTIMIZERS[row](learning_rate=0.1, fit=ol.svd())


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def all_finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def largest(tree):
    return max(float(jnp.max(jnp.abs(x.astype(jnp.float32)))) for x in jax.tree.leaves(tree))


# Gradients with a structure


def structured(m, n):
    """Matrices whose columns depend on each other, (5, m, n): their Gram matrices are singular up to round-off."""
    random = np.random.default_rng(0)
    half = np.zeros((m, n))
    half[: m // 2, : n // 2] = 1
    rows = random.standard_normal((m, 1))
    matrices = [
        np.ones((m, n)),
        np.sign(random.standard_normal((m, 1)) * random.standard_normal((1, n))),
        half,
        np.outer(random.integers(0, 2, m), random.standard_normal(n)),
        np.repeat(rows, n, axis=1),
    ]
    return jnp.asarray(np.stack(matrices), jnp.float32)


def assert_orthonormal(P, tolerance):
    """Columns orthonormal or zero, and one at least that is not zero."""
    P = np.asarray(P, np.float64)
    used = np.any(P != 0, axis=-2)
    assert used.any(axis=-1).all()
    gram = np.swapaxes(P, -1, -2) @ P
    np.testing.assert_allclose(gram, np.eye(P.shape[-1]) * used[..., None], atol=tolerance)


@pytest.mark.parametrize("row", ["galore", "fira", "gradnormlorp_8bit", "low_rank_muon"])
def test_structured_gradients_give_a_basis(row):
    fit = ol.subspace_iteration() if row == "low_rank_muon" else ol.randomized_svd()
    tx = OPTIMIZERS[row](learning_rate=0.1, rank=4, fit=fit)
    grads = {"stack": structured(24, 40)}
    _, state, updates = run(tx, {"stack": normal((5, 24, 40))}, [grads])
    assert all_finite((updates, state))
    (leaf,) = low_rank_state(state).leaves.values()
    for basis in jax.tree.leaves(leaf.basis):
        assert_orthonormal(basis, 1e-2 if basis.dtype == jnp.bfloat16 else 1e-4)
    assert ol.diagnostics(state)["stack"].skips.tolist() == [0] * 5
    assert all(bool(jnp.any(u != 0)) for u in updates[0]["stack"])


@pytest.mark.parametrize("fit", [ol.randomized_svd(), ol.subspace_iteration()], ids=str)
def test_a_tall_gradient_of_ones(fit):
    """The round-off of constant columns grows with their number and length."""
    tx, ones = ol.low_rank(optax.identity(), rank=64, fit=fit), {"kernel": jnp.ones((512, 256))}
    update, state = jax.jit(tx.update)(ones, tx.init(ones))
    np.testing.assert_allclose(update["kernel"], 1, atol=1e-4)
    assert_orthonormal(state.leaves["kernel"].basis, 1e-4)


def test_a_warm_basis_finds_a_gradient_that_is_orthogonal_to_it():
    tx = ol.low_rank(optax.identity(), rank=2, fit=ol.subspace_iteration(), refresh=ol.every(1))
    first, second = (jnp.eye(6, 8, k).at[2:].set(0) for k in (0, 0))
    second = jnp.roll(second, 3, axis=(0, 1))
    _, state, updates = run(tx, {"w": first}, [{"w": first}, {"w": second}])
    assert ol.diagnostics(state)["w"].rank.tolist() == [2]
    np.testing.assert_allclose(updates[1]["w"], second, atol=1e-5)


# Names and neighbours

NAMES = {
    (6, 8): ("w", "mu/w", "nu", "basis", "rule", "leaves", "count", "matrix"),
    (2, 6, 8): ("stack", "R", "I", "J"),
    (9,): ("vector", "inner", "stats", "value", "trace", "magnitude", "mu", "dense"),
}
FEW = {(6, 8): ("w", "mu/w", "nu"), (2, 6, 8): ("stack", "R"), (9,): ("vector", "inner", "mu")}


@every_row
def test_a_leaf_depends_neither_on_its_name_nor_on_other_leaves(row):
    names = NAMES if row == "galore" else FEW  # names are the core's, whatever the rule
    reference = {same[0] for same in names.values()}
    alike = {name: (same[0], shape) for shape, same in names.items() for name in same}
    # the same numbers in all leaves of a shape
    equal_leaves = lambda seed: {name: normal(shape, seed) for name, (_, shape) in alike.items()}
    tx, params, grads = exact(row), equal_leaves(0), [equal_leaves(seed) for seed in range(1, 6)]
    pick = lambda tree: {name: tree[name] for name in reference}
    _, _, want = run(tx, pick(params), [pick(grad) for grad in grads])
    clean, clean_state, updates = run(tx, params, grads)
    for got, one in zip(updates, want, strict=True):
        expected = {name: one[same] for name, (same, _) in alike.items()}
        assert_trees_close(got, expected, 1e-4)  # another program rounds differently

    # what is not finite in some leaves is nothing to the others, neither now nor later
    bad = {"mu/w", "nu", "R", "inner", "mu"}
    poison = lambda grad: {k: x * jnp.nan if k in bad else x for k, x in grad.items()}
    grads[1], grads[3] = poison(grads[1]), poison(grads[3])
    got, state, updates = run(tx, params, grads)
    good = lambda tree: {name: x for name, x in tree.items() if name not in bad}
    assert_trees_close(good(got), good(clean), 1e-6)
    leaves, clean_leaves = (low_rank_state(s).leaves for s in (state, clean_state))
    assert_trees_close(good(leaves), good(clean_leaves), 1e-6)
    assert all(not bool(jnp.any(updates[i][name])) for i in (1, 3) for name in bad)
    assert all_finite((updates, state))


LEAVES = {"mu": (6, 8), "value": (6, 8), "w": (9,)}  # in the order of every container


class Fields(collections.namedtuple("Fields", LEAVES)):
    pass


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mu", "value", "w"], meta_fields=[]
)
@dataclasses.dataclass
class Data:
    mu: jax.Array
    value: jax.Array
    w: jax.Array


class Module(eqx.Module):
    mu: jax.Array
    value: jax.Array
    w: jax.Array


class Model(nnx.Module):
    def __init__(self, mu, value, w):
        self.mu, self.value, self.w = nnx.Param(mu), nnx.Param(value), nnx.Param(w)


CONTAINERS = {
    "dict": lambda **leaves: leaves,
    "list": lambda **leaves: list(leaves.values()),
    "tuple": lambda **leaves: tuple(leaves.values()),
    "named_tuple": Fields,
    "dataclass": Data,
    "equinox": Module,
    "nnx": lambda **leaves: nnx.state(Model(**leaves), nnx.Param),
    "linen": lambda **leaves: {
        name: nn.Partitioned(x, (None,) * x.ndim) for name, x in leaves.items()
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container):
    """Leaf 0 of a list has the path of the first link of a chain; a field may be called `value`."""
    make = lambda seed: {k: normal(shape, seed) for k, shape in LEAVES.items()}
    grads = [make(seed) for seed in range(1, 5)]
    grads[1]["mu"] = grads[1]["mu"] * jnp.nan

    def history(container):
        tx, build = exact("gradnormlorp_8bit"), CONTAINERS[container]
        _, state, updates = run(tx, build(**make(0)), [build(**grad) for grad in grads])
        counts = [leaf.rule for leaf in low_rank_state(state).leaves.values()]
        return jax.tree.leaves(updates), jax.tree.leaves(counts)

    assert_trees_close(history(container), history("dict"), 1e-5)


# Skipped leaves


@pytest.mark.parametrize("row", ["galore", "fira", "gradnormlorp", "low_rank_muon"])
def test_a_skipped_leaf_does_not_decay(row):
    tx = OPTIMIZERS[row](learning_rate=0.1, fit=ol.svd(), weight_decay=0.5)
    params = {"stack": normal((2, 6, 8)), "vector": normal(9), "other": normal(9)}
    grads = jax.tree.map(jnp.ones_like, params)
    grads["stack"] = normal((2, 6, 8), 1).at[1, 2, 3].set(jnp.inf)
    grads["vector"] = grads["vector"].at[4].set(jnp.nan)
    _, state, (update,) = run(tx, params, [grads])
    assert not jnp.any(update["stack"][1])
    assert not jnp.any(update["vector"])
    assert jnp.all(jnp.any(update["stack"][0] != 0, axis=1))
    assert jnp.all(update["other"] != 0)
    assert ol.diagnostics(state)["stack"].skips.tolist() == [0, 1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_dense_leaf_keeps_its_codes(accumulate):
    bits = {"bits": 8, "min_size": 16}
    tx = ol.galore(0.1, rank=2, fit=ol.svd(), state_bits=bits, accumulate=accumulate)
    params = {"kernel": normal((6, 8)), "vector": normal(40), "other": normal(40)}
    good = jax.tree.map(jnp.ones_like, params)
    bad = good | {"vector": good["vector"].at[4].set(jnp.nan)}
    _, before, _ = run(tx, params, [good] * accumulate)
    _, after, updates = run(tx, params, [bad] * accumulate, before)
    assert not any(jnp.any(update["vector"]) for update in updates)
    assert jnp.all(updates[-1]["other"] != 0)
    find = lambda state: [x for x in jax.tree.leaves(state, is_leaf=is_codes) if is_codes(x)]
    is_codes = lambda x: isinstance(x, OfRuleState) and "vector" in x.leaves
    (old,), (new,) = find(before), find(after)
    assert_trees_equal(new.leaves["vector"].inner.mu, old.leaves["vector"].inner.mu)
    assert_trees_equal(new.leaves["vector"].block_scale, old.leaves["vector"].block_scale)
    assert jnp.any(new.leaves["other"].block_scale["mu"] != old.leaves["other"].block_scale["mu"])


@every_row
def test_weight_decay_does_not_change_the_structure_of_the_state(row):
    params = normal_tree("mlp", seed=0)
    none, some = (OPTIMIZERS[row](learning_rate=0.1, weight_decay=d) for d in (0.0, 0.1))
    injected = ol.inject_hyperparams(OPTIMIZERS[row])(learning_rate=0.1, weight_decay=0.0)
    want = jax.eval_shape(none.init, params)
    assert jax.eval_shape(some.init, params) == want
    assert jax.eval_shape(injected.init, params).inner_state == want


def test_two_policies_are_refused_at_once():
    with pytest.raises(ValueError, match="`on_convergence` needs a number"):
        ol.adarankgrad(0.1, on_convergence=0.3, update_proj_gap=ol.every(3))


# Sizes

ROWS_OF_SIZES = [(row, jnp.float32) for row in OPTIMIZERS] + [
    (row, dtype)
    for row in ("galore_8bit", "fira", "gradnormlorp")
    for dtype in (jnp.bfloat16, jnp.float16)
]


@pytest.mark.parametrize(("row", "dtype"), ROWS_OF_SIZES)
def test_gradients_of_any_size(row, dtype):
    """A finite gradient takes a step of the usual size or none, and the steps after it are usual ones."""
    tx, step = exact(row), compiled_step(exact(row))
    shapes = {"kernel": (6, 8), "vector": (9,)}
    tree = lambda seed: {name: normal(shape, seed).astype(dtype) for name, shape in shapes.items()}
    params, sizes = tree(0), (1e-30, 1e-20, 1e-10, 1e-4, 1e3, 1e10, 1e18, 1e20, 1e25, 1e30)
    most = float(jnp.finfo(dtype).max)
    sizes = [s for s in sizes if 1 / s < most > 8 * s]
    state = tx.init(params)
    _, state, _ = step(params, state, tree(1))
    begin = ol.diagnostics(state)["kernel"].skips
    for size in sizes:
        now = state
        huge = jax.tree.map(lambda x, size=size: x * jnp.asarray(size, dtype), tree(2))
        for grad in (huge, tree(3), tree(4)):
            _, now, updates = step(params, now, grad)
            assert all_finite((updates, now)), size
            assert largest(updates) < 2, size
        skips = int((ol.diagnostics(now)["kernel"].skips - begin)[0])
        if dtype == jnp.float16 or 1e-10 <= size <= 1e10:
            assert skips == 0, size
        elif size >= 1e20:  # its square overflows
            assert skips == 1, size
        if size >= 1e20:
            assert not jnp.any(step(params, state, huge)[2]["vector"])


@pytest.mark.parametrize("size", [1e-200, 1e15])
def test_wide_gradients_of_any_size(size):
    with jax.enable_x64(True):
        tx = ol.low_rank(optax.identity(), rank=4, fit=ol.randomized_svd())
        grads = {"w": size * jnp.outer(jnp.arange(1.0, 13), jnp.arange(1.0, 21))}
        update, _ = jax.jit(tx.update)(grads, tx.init(grads))
        np.testing.assert_allclose(update["w"] / size, grads["w"] / size, rtol=1e-9)


def test_wide_numbers_by_default():
    """`jax_enable_x64`: codes and coded bases of float32 and of float64 parameters."""
    with jax.enable_x64(True):
        tx = OPTIMIZERS["gradnormlorp_8bit"](learning_rate=0.1, basis_bits=4)
        for dtype in (jnp.float32, jnp.float64):
            make = lambda seed, dtype=dtype: {
                name: normal(shape, seed).astype(dtype)
                for name, shape in {"a": (6, 8), "bb": (6, 8), "vector": (9,)}.items()
            }
            params = make(0)
            _, state, updates = run(tx, params, [make(1), make(2)])
            assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
            assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))
            assert all_finite((updates, state))


def test_a_leaf_without_elements():
    params = {"kernel": normal((6, 8)), "empty": jnp.zeros((0, 4)), "vector": normal(9)}
    _, _, updates = run(exact("galore_8bit"), params, [params, params])
    assert updates[1]["empty"].shape == (0, 4)
    assert all_finite(updates)


def test_codes_of_a_field_that_is_called_nu():
    """A first moment below an attribute `nu` has a sign like any other."""
    tree = collections.namedtuple("Tree", ["w", "nu"])
    grads = tree(*[jnp.linspace(-1, 1, 64)] * 2)
    tx = ol.quantize_state(optax.scale_by_adam(), min_size=1)
    _, _, updates = run(tx, grads, [grads] * 3)
    for update in updates:
        np.testing.assert_array_equal(update.nu, update.w)
        np.testing.assert_allclose(update.w, jnp.sign(grads.w), atol=0.1)


# Bounds of column weights


def unheld():
    """Gradients of which the basis hardly holds some columns, and those that follow them."""
    random = np.random.default_rng(0)
    blocks = np.zeros((16, 24))
    blocks[:8, :12] = random.standard_normal((8, 12))
    blocks[8:, 12:] = 1e-2 * random.standard_normal((8, 12))
    rows = random.standard_normal((16, 24)) * (random.random((16, 1)) < 0.3)
    unseen = random.standard_normal((16, 24))
    unseen[:, 12:] = 0
    later = 1e-3 * random.standard_normal((16, 24))
    later[:, :12] *= 1e3
    return {
        name: jnp.asarray(x, jnp.float32)
        for name, x in {"blocks": blocks, "rows": rows, "unseen": unseen, "later": later}.items()
    }


@functools.cache
def weighted(method, fit):
    fit = {"svd": ol.svd(), "randomized_svd": ol.randomized_svd()}[fit]
    factory = functools.partial(getattr(ol, method), limit=1e9)  # as if there were no limiter
    return factory(1.0, rank=4, fit=fit, update_proj_gap=2, scale=1.0)


@pytest.mark.parametrize("fit", ["svd", "randomized_svd"])
@pytest.mark.parametrize("method", ["fira", "apollo"])
@pytest.mark.parametrize("kind", ["blocks", "rows", "unseen"])
def test_no_column_outruns_the_moments(method, fit, kind):
    """‖E_j‖ φ_j ≤ 2 √(m / r) ‖N_j‖, on the first step, after it, and after a refresh."""
    grads, m, r = unheld(), 16, 4
    step, state = compiled_step(weighted(method, fit)), None
    state = weighted(method, fit).init({"w": grads[kind]})
    for grad in (grads[kind], grads["later"], grads["later"], grads[kind]):
        _, state, update = step({"w": grad}, state, {"w": grad})
        U = -np.asarray(update["w"], np.float64)
        # Adam goes no further than (1 − b1) / √(1 − b2) in a coordinate
        furthest = 3.2 * r**0.5
        if method == "fira":
            (leaf,) = low_rank_state(state).leaves.values()
            basis = np.asarray(leaf.basis[0], np.float64)
            N = basis.T @ U
            lengths = np.linalg.norm(N, axis=0)
            residual = np.linalg.norm(U - basis @ N, axis=0)
            used = np.any(basis != 0, axis=0).sum()
            assert np.all(residual <= 2.01 * (m / used) ** 0.5 * lengths + 1e-5)
            assert lengths.max() <= furthest
        assert np.linalg.norm(U, axis=0).max() <= furthest * (1 + 2 * (m / r) ** 0.5)


@pytest.mark.parametrize("method", ["fira", "apollo"])
def test_a_gradient_that_leaves_the_basis_takes_no_leap(method):
    """R = 0 where the moments still move: the bound holds by the columns in use, which R does not show then."""
    m, r = 8, 2
    tx = getattr(ol, method)(1.0, rank=r, fit=ol.svd(), scale=1.0)
    words = [jnp.zeros((m, 12)).at[row].set(jnp.linspace(1, 2, 12)) for row in (0, 5, 5)]
    grads = [
        {"w": G} for G in (words[0], 0 * words[0], *words[1:])
    ]  # after a zero nothing is limited
    _, _, updates = run(tx, grads[0], grads)
    furthest = 3.2 * r**0.5
    for update in updates:
        U = np.asarray(update["w"])
        assert np.linalg.norm(U, axis=0).max() <= furthest * (1 + 2 * (m / r) ** 0.5)


# Parts of Optax

INNER = {
    "adafactor": lambda: optax.adafactor(0.1),
    "factored_rms": optax.scale_by_factored_rms,
    "novograd": optax.scale_by_novograd,
    "muon": optax.contrib.scale_by_muon,
    "trust_ratio": optax.scale_by_trust_ratio,
    "prodigy": optax.contrib.prodigy,
    "lamb": lambda: optax.lamb(0.1),
    "lion": optax.scale_by_lion,
}
WORK = {"factored_rms", "muon", "lion"}


@pytest.mark.parametrize("name", INNER)
def test_transformations_of_coordinates_work_or_say_why_not(name):
    params = {"w": normal((6, 8))}
    tx = ol.low_rank(INNER[name](), rank=2, fit=ol.svd())
    if name in WORK:
        _, _, updates = run(tx, params, [params, params])
        assert all_finite(updates)
        assert all(bool(jnp.any(update["w"] != 0)) for update in updates)
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each says it in its own way
            run(tx, params, [params])
        notes = " ".join(caught.value.__notes__)
        assert "inside `low_rank` sees the coordinates" in notes


@pytest.mark.parametrize("opaque", [False, True], ids=["transparent", "opaque"])
def test_sharpness_aware_steps(opaque):
    tx = optax.contrib.sam(
        ol.galore(0.1, rank=2, fit=ol.svd(), update_proj_gap=2),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        sync_period=2,
        opaque_mode=opaque,
    )
    params = {"w": normal((6, 8)), "vector": normal(9)}
    loss = lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    more = {"grad_fn": lambda params, _: jax.grad(loss)(params)} if opaque else {}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, **more)
        return optax.apply_updates(params, updates), state

    state, before = tx.init(params), loss(params)
    for _ in range(8):
        params, state = step(params, state)
    (report,) = ol.diagnostics(state).values()
    # four updates, refit at 0 and 2; whatever arithmetic Optax has done with the state
    assert (report.steps_since_refresh.tolist(), report.skips.tolist()) == ([1], [0])
    assert loss(params) < before


# Devices


@pytest.mark.parametrize("row", ["fira", "natural_galore", "gradnormlorp_8bit", "low_rank_muon"])
def test_each_device_its_own_gradient(row):
    """`shard_map` over eight devices is eight runs."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx, shapes = exact(row), {"kernel": (6, 8), "vector": (9,)}
    params = {name: normal(shape) for name, shape in shapes.items()}
    grads = {name: normal((8, 2, *shape), 1) for name, shape in shapes.items()}

    def two_steps(params, grads):
        state = tx.init(params)
        for i in range(2):
            updates, state = tx.update(jax.tree.map(lambda g, i=i: g[0, i], grads), state, params)
        return jax.tree.map(lambda u: u[None], updates)

    on_all = jax.shard_map(two_steps, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    got = jax.device_get(jax.jit(on_all)(params, grads))
    alone = jax.jit(two_steps)
    for device in (0, 5):
        want = alone(params, jax.tree.map(lambda g, i=device: g[i : i + 1], grads))
        assert_trees_close(jax.tree.map(lambda u, i=device: u[i : i + 1], got), want, 1e-4)


# Derivatives


@pytest.mark.parametrize("method", ["galore", "fira", "low_rank_muon"])
def test_updates_have_derivatives(method):
    """Of learned learning rates and unrolled steps; a basis is a constant to them."""
    params = {"w": normal((6, 8))}
    tx = getattr(ol, method)(1.0, rank=2, eps=0.1)
    state = tx.init(params)
    along = jax.jit(lambda size: tx.update({"w": size * params["w"]}, state, params)[0]["w"].sum())
    slope = jax.grad(along)(1.0)
    h = 1e-2
    np.testing.assert_allclose(slope, (along(1 + h) - along(1 - h)) / (2 * h), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["galore", "fira"])
def test_moments_carry_derivatives_to_the_next_step(method):
    """Of the second update by the size of the first gradient."""
    params = {"w": normal((6, 8))}
    tx = getattr(ol, method)(1.0, rank=2, eps=0.1)
    start = tx.init(params)

    @jax.jit
    def second(size):
        _, state = tx.update({"w": size * params["w"]}, start, params)
        return jnp.sum(tx.update(params, state, params)[0]["w"])

    h = 1e-2
    slope = (second(1 + h) - second(1 - h)) / (2 * h)
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(jax.grad(second)(1.0), slope, rtol=2e-2)


# Dense leaves of a transformation that knows a part of them


@pytest.mark.parametrize("name", ["optax", "rule"])
def test_a_skipped_dense_leaf_keeps_its_state_in_a_partition(name):
    parts = {"optax": optax.trace(0.9), "rule": ol.quantize_state(optax.trace(0.9), min_size=2)}
    labels = {"w": "rest", "b": "moving", "c": "rest"}
    moving = optax.chain(parts[name], optax.scale(-0.1))
    dense = optax.partition({"moving": moving, "rest": optax.sgd(0.1)}, labels)
    params = {"w": jnp.ones((6, 8)), "b": jnp.ones(3), "c": jnp.ones(4)}
    bad = params | {"b": jnp.array([jnp.nan, 1.0, 1.0])}
    tx = ol.galore(0.1, rank=2, dense=dense)
    _, _, updates = run(tx, params, [params, bad, params])
    assert not updates[1]["b"].any()
    np.testing.assert_allclose(updates[2]["b"], -0.19, rtol=1e-2)  # as after one step
