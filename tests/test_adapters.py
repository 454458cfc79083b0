"""Adapters: the formula and its gradients, any tree of weights, any optimizer."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import optax_lowrank as ol

from .helpers import OPTIMIZERS, assert_trees_close, low_rank_state, normal_tree

ROUNDING = 1e-5  # float32 sums of up to 20 terms, and a few operations more
MLP = ["hidden/kernel", "out/kernel"]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def trained(adapter, seed=1):
    """An adapter that changes something: noise on every part."""
    leaves, treedef = jax.tree.flatten(adapter)
    noise = [0.5 * normal(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(x + n for x, n in zip(leaves, noise, strict=True))


def merged_weight(W0, I, J, M, s):
    """The formula for one matrix, in float64."""
    W0, I, J, M = (np.asarray(x, np.float64) for x in (W0, I, J, M))
    Z = W0 + s * I @ J
    return M * Z / np.linalg.norm(Z, axis=0)


# Construction


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("problem", ["mlp", "transformer"])
def test_a_new_adapter_changes_nothing(problem, dtype):
    params = normal_tree(problem, 0, dtype)
    adapter = ol.adapters.init(params, rank=3)
    assert_trees_close(ol.adapters.merge(params, adapter), params, 1e-6)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}


def test_which_leaves_and_shapes():
    adapter = ol.adapters.init(normal_tree("transformer", 0), rank=3, dtype=jnp.bfloat16)
    shapes = {
        path: [parts[k].shape for k in ("I", "J", "magnitude")] for path, parts in adapter.items()
    }
    assert shapes == {
        "layers/mlp/kernel": [(2, 6, 3), (2, 3, 8), (16,)],  # a stack of two
        "attention/query/kernel": [(6, 3), (3, 8), (8,)],  # two heads of four: one matrix
        "attention/out/kernel": [(8, 3), (3, 6), (6,)],
    }
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.bfloat16)}


def test_overrides_and_rank_choose_leaves():
    params = {"a": normal(5, 7), "c": normal(4, 9), "gru": normal(3, 5, 7)}
    assert set(ol.adapters.init(params, 4)) == {"a", "gru"}  # a side of "c" is no longer than 4
    axes = {"a": None, "gru": ol.MatrixAxes((0, 1), 2)}
    adapter = ol.adapters.init(params, 4, axes=axes)
    assert adapter["gru"]["I"].shape == (15, 4)
    assert set(adapter) == {"gru"}
    with pytest.raises(ValueError, match=r"'gru'.*the `axes` that `init` had"):
        ol.adapters.merge(params, adapter)
    got = ol.adapters.merge(params, trained(adapter), axes=axes)["gru"]
    parts = trained(adapter)["gru"]
    want = merged_weight(
        params["gru"].reshape(15, 7), *(parts[k] for k in ("I", "J", "magnitude")), 1
    )
    np.testing.assert_allclose(got.reshape(15, 7), want, atol=ROUNDING * np.abs(want).max())


def test_factors_are_kaiming_normal_and_differ_between_leaves_and_seeds():
    params = {"a": normal(200, 100), "c": normal(200, 100)}
    I, other = (ol.adapters.init(params, 50)[path]["I"] for path in params)
    assert np.std(I) == pytest.approx(np.sqrt(2 / 200), rel=0.05)
    assert not jnp.allclose(I, other)
    assert not jnp.allclose(I, ol.adapters.init(params, 50, seed=1)["a"]["I"])
    np.testing.assert_array_equal(I, ol.adapters.init(params, 50)["a"]["I"])


def test_optimizers_see_factors_as_matrices_and_magnitudes_as_dense():
    adapter = ol.adapters.init(normal_tree("transformer", 0), rank=3)
    axes = ol.matrix_axes(adapter)
    for parts, found in ((adapter[path], axes[path]) for path in adapter):
        batch = parts["I"].ndim - 2
        assert found["I"] == found["J"] == ol.MatrixAxes(batch, batch + 1)
        assert found["magnitude"] is None


# The merged weights


def test_merged_equals_unmerged():
    """(M / ‖Z‖) (x W₀ + s (x I) J), the form that never makes W."""
    W0, x, s = normal(5, 7), normal(3, 5, seed=7), 0.7
    adapter = trained(ol.adapters.init({"kernel": W0}, rank=2))
    I, J, M = (adapter["kernel"][k] for k in ("I", "J", "magnitude"))
    z = np.linalg.norm(W0 + s * I @ J, axis=0)
    want = (x @ W0 + s * (x @ I) @ J) * (M / z)[None]
    got = x @ ol.adapters.merge({"kernel": W0}, adapter, scale=s)["kernel"]
    np.testing.assert_allclose(got, want, atol=ROUNDING * np.abs(want).max())


def test_stack_is_a_loop_over_its_matrices():
    W = normal(3, 5, 7)
    adapter = trained(ol.adapters.init({"kernel": W}, rank=2))
    stacked = ol.adapters.merge({"kernel": W}, adapter)["kernel"]
    I, J, M = (adapter["kernel"][k] for k in ("I", "J", "magnitude"))
    for i, w in enumerate(W):
        one = {"kernel": {"I": I[i], "J": J[i], "magnitude": M.reshape(3, 7)[i]}}
        assert_trees_close(ol.adapters.merge({"kernel": w}, one)["kernel"], stacked[i], ROUNDING)


def gradient(W0, adapter, D, **options):
    """Of ⟨D, W⟩ in I, J and M; D is the gradient of W."""

    def loss(adapter):
        return jnp.sum(D * ol.adapters.merge({"kernel": W0}, adapter, **options)["kernel"])

    return jax.grad(loss)(adapter)["kernel"]


def test_gradients_are_those_of_finite_differences():
    W0, D, s = np.asarray(normal(5, 7)), np.asarray(normal(5, 7, seed=9)), 0.7
    adapter = trained(ol.adapters.init({"kernel": jnp.asarray(W0)}, rank=2))
    parts = {k: np.asarray(x, np.float64) for k, x in adapter["kernel"].items()}
    value = lambda parts: np.sum(
        D * merged_weight(W0, parts["I"], parts["J"], parts["magnitude"], s)
    )
    for name, got in gradient(W0, adapter, D, scale=s).items():
        want = np.zeros(parts[name].shape)
        for at in np.ndindex(want.shape):
            for sign in (1, -1):
                moved = parts[name].copy()
                moved[at] += sign * 1e-5
                want[at] += sign * value(parts | {name: moved}) / 2e-5
        np.testing.assert_allclose(got, want, atol=ROUNDING * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("detach_norm", [False, True])
def test_gradients_of_the_paper(detach_norm):
    """D_Z = (M/z) (D − Ẑ (Ẑ · D)), with detached norm (M/z) D; D_I = s D_Z Jᵀ, D_J = s Iᵀ D_Z, D_M = Ẑ · D."""
    W0, D, s = np.asarray(normal(5, 7)), np.asarray(normal(5, 7, seed=9)), 0.7
    adapter = trained(ol.adapters.init({"kernel": jnp.asarray(W0)}, rank=2))
    I, J, M = (np.asarray(adapter["kernel"][k], np.float64) for k in ("I", "J", "magnitude"))
    Z = W0 + s * I @ J
    z = np.linalg.norm(Z, axis=0)
    D_M = np.sum(D * Z / z, axis=0)
    D_Z = M / z * (D if detach_norm else D - Z / z * D_M)
    want = {"I": s * D_Z @ J.T, "J": s * I.T @ D_Z, "magnitude": D_M}
    got = gradient(W0, adapter, D, scale=s, detach_norm=detach_norm)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=ROUNDING * np.abs(x).max(), err_msg=name)


@pytest.mark.parametrize("detach_norm", [False, True])
def test_a_column_of_zeros_has_finite_values_and_gradients(detach_norm):
    W0 = normal(5, 7).at[:, 2].set(0)
    adapter = ol.adapters.init({"kernel": W0}, rank=2)
    assert (ol.adapters.merge({"kernel": W0}, adapter)["kernel"][:, 2] == 0).all()
    grads = gradient(W0, adapter, jnp.ones((5, 7)), detach_norm=detach_norm)
    assert all(jnp.isfinite(g).all() for g in grads.values())
    assert jnp.abs(grads["J"][:, 2]).min() > 0  # the column can come to life
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, adapter, {"kernel": grads})
    assert jnp.isfinite(ol.adapters.merge({"kernel": W0}, moved)["kernel"]).all()


def test_bfloat16_weights_are_merged_in_float32():
    W0 = normal(5, 7, dtype=jnp.bfloat16)
    adapter = trained(ol.adapters.init({"kernel": W0}, rank=2))
    got = ol.adapters.merge({"kernel": W0}, adapter)["kernel"]
    wide = ol.adapters.merge({"kernel": W0.astype(jnp.float32)}, adapter)["kernel"]
    assert_trees_close(got, wide.astype(jnp.bfloat16), 0)


# Models


def test_linen_model_is_unchanged():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
            return nn.Dense(6, name="out")(
                nn.relu(nn.Dense(8, kernel_init=boxed, name="hidden")(x))
            )

    x = normal(3, 6)
    variables = Net().init(jax.random.key(0), x)
    adapter = ol.adapters.init(variables, rank=2)
    assert sorted(adapter) == [f"params/{path}" for path in MLP]
    assert_trees_close(
        Net().apply(ol.adapters.merge(variables, adapter), x), Net().apply(variables, x), 1e-6
    )
    merged = ol.adapters.merge(nn.FrozenDict(variables), trained(adapter))
    assert isinstance(merged, nn.FrozenDict)
    assert not jnp.allclose(Net().apply(merged, x), Net().apply(variables, x), atol=1e-2)


def test_nnx_model_is_unchanged():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    x, net = normal(3, 6), Net(nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    adapter = ol.adapters.init(params, rank=2)
    assert sorted(adapter) == MLP
    assert_trees_close(nnx.merge(graph, ol.adapters.merge(params, adapter))(x), net(x), 1e-6)
    moved = nnx.merge(graph, ol.adapters.merge(params, trained(adapter)))
    weights = {name: np.asarray(getattr(moved, name).kernel[...]) for name in ("hidden", "out")}
    for name, W in weights.items():
        parts = trained(adapter)[f"{name}/kernel"]
        W0 = getattr(net, name).kernel[...]
        want = merged_weight(W0, parts["I"], parts["J"], parts["magnitude"], 1)
        np.testing.assert_allclose(W, want, atol=ROUNDING * np.abs(want).max())


# Training


@pytest.mark.parametrize("name", ["galore", "natural_galore", "gradnormlorp", "low_rank_muon"])
def test_optimizers_train_an_adapter(name):
    """Factors of rank 4 projected to 2 on the long side; I has no gradient before J moves, and no basis till then."""
    W0, target = normal(8, 8), normal(8, 8, seed=1)  # square: both factors compile as one shape
    adapter = ol.adapters.init({"kernel": W0}, rank=4)
    make = functools.partial(OPTIMIZERS[name], learning_rate=0.05, side="long")
    tx = make(scale=1.0) if "scale" in inspect.signature(make).parameters else make()

    def loss(adapter):
        merged = ol.adapters.merge({"kernel": W0}, adapter)
        return jnp.sum((merged["kernel"] - target) ** 2)

    @jax.jit
    def step(adapter, state):
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, losses, bases = tx.init(adapter), [], []
    for _ in range(8):
        adapter, state, value = step(adapter, state)
        losses.append(float(value))
        bases.append(np.asarray(low_rank_state(state).stats.last_fit))  # of I and J
    assert bases[0].tolist() == [-1, 0]
    assert bases[1].min() >= 0
    assert losses[-1] < 0.9 * losses[0]
    assert np.isfinite(losses).all()


# Mistakes


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (2.0, TypeError, "`rank` must be an int, got 2.0"),
        (True, TypeError, "`rank` must be an int"),
        (0, ValueError, "`rank` must be positive, got 0"),
        (6, ValueError, "no matrix with both sides longer than `rank` = 6"),
    ],
)
def test_wrong_rank(rank, error, message):
    with pytest.raises(error, match=message):
        ol.adapters.init(normal_tree("mlp", 0), rank)


def test_wrong_weights():
    params = normal_tree("mlp", 0)
    adapter = ol.adapters.init(params, 2)
    with pytest.raises(
        ValueError, match=r"\['hidden/kernel'\], which `params` have not.*'out/kernel'"
    ):
        ol.adapters.merge({"out": params["out"]}, adapter)
    other = {"out": adapter["hidden/kernel"]} | adapter
    with pytest.raises(
        ValueError, match=r"'out' of shape \(6,\).*does not fit its matrix axes, None"
    ):
        ol.adapters.merge({**params, "out": jnp.ones(6)}, {"out": other["out"]})
    wrong = {"out/kernel": adapter["hidden/kernel"]}
    with pytest.raises(ValueError, match=r"'out/kernel' of shape \(8, 6\) has .*\(6, 2\)"):
        ol.adapters.merge(params, wrong)
    with pytest.raises(TypeError, match="'kernel' is int32"):
        ol.adapters.init({"kernel": jnp.ones((6, 8), jnp.int32)}, 2)
    with pytest.raises(ValueError, match="'nothing' match no leaf"):
        ol.adapters.init(params, 2, axes={"nothing": None})
