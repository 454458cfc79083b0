"""Views: folding loses nothing, and a leaf has one path, boxed or bare, in whatever tree users keep it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx, struct
from hypothesis import given, strategies as st

from optax_lowrank.classify import axes_by_path
from optax_lowrank.views import (
    MatrixAxes,
    MatrixView,
    flatten_by_path,
    leaf_path,
    leaves_with_path,
)


@st.composite
def leaves(draw):
    """A shape and axes that fit it, some negative, in any order, with any number of batch axes."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    ndim = len(shape)
    axes = draw(st.permutations(range(ndim)))
    first = draw(st.integers(1, ndim - 1))
    second = draw(st.integers(1, ndim - first))
    signed = [axis - ndim * draw(st.booleans()) for axis in axes]
    sides = signed[:first], signed[first : first + second]
    sides = [side[0] if len(side) == 1 and draw(st.booleans()) else tuple(side) for side in sides]
    return tuple(shape), MatrixAxes(*sides)


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# Views


@given(leaves(), st.sampled_from(["short", "long"]))
def test_fold_and_unfold_are_inverse_and_keep_the_projected_side_first(leaf, side):
    shape, axes = leaf
    view = MatrixView.of(shape, axes, side)
    x = numbered(shape)
    G = view.fold(x)
    assert G.shape == (view.batch, view.m, view.n)
    assert view.m <= view.n if side == "short" else view.m >= view.n
    np.testing.assert_array_equal(view.unfold(G), x)
    assert hash(view) == hash(MatrixView.of(shape, axes, side))


@given(leaves(), st.sampled_from(["short", "long"]))
def test_matrix_is_a_row_of_fold(leaf, side):
    shape, axes = leaf
    view = MatrixView.of(shape, axes, side)
    x = numbered(shape)
    matrix = jax.jit(view.matrix)
    for i, expected in enumerate(view.fold(x)):
        np.testing.assert_array_equal(matrix(x, i), expected)
        np.testing.assert_array_equal(view.matrix(x, i), expected)


@given(leaves())
def test_fold_agrees_with_einsum(leaf):
    """Projecting the folded matrices is the contraction over the projected axes that one would write by hand."""
    shape, axes = leaf
    view = MatrixView.of(shape, axes, "short")
    x = numbered(shape)
    letters = "abcdefg"[: len(shape)]
    projected = "".join(letters[a] for a in view.projected_axes)
    other = "".join(letters[a] for a in view.batch_axes + view.other_axes)
    ones = np.ones([shape[a] for a in view.projected_axes], np.float32)
    by_hand = np.einsum(f"{letters},{projected}->{other}", x, ones)
    np.testing.assert_allclose(view.fold(x).sum(1).ravel(), by_hand.ravel(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_fold_does_not_cast(dtype):
    view = MatrixView.of((3, 2, 4), MatrixAxes(-2, -1))
    x = jnp.ones((3, 2, 4), dtype)
    assert view.fold(x).dtype == view.unfold(view.fold(x)).dtype == view.matrix(x, 1).dtype == dtype


@pytest.mark.parametrize(
    ("shape", "side", "projected"),
    [
        ((8, 4), "short", 1),
        ((8, 4), "long", 0),
        ((4, 8), "short", 0),
        ((4, 8), "long", 1),
        ((8, 8), "short", 0),
        ((8, 8), "long", 0),
    ],
)
@pytest.mark.parametrize("flipped", [False, True])
def test_orientation(shape, side, projected, flipped):
    """The shorter or the longer side, whichever axis it is; of a square, the reduction."""
    axes = MatrixAxes(0, 1)
    if flipped:
        shape, axes, projected = shape[::-1], MatrixAxes(1, 0), 1 - projected
    view = MatrixView.of(shape, axes, side)
    assert view.projected_axes == (projected,)
    assert (view.batch, view.m, view.n) == (1, shape[projected], shape[1 - projected])
    assert view.flipped == (projected == 1)
    if side == "short":
        assert MatrixView.of(shape, axes, "both") == view


@pytest.mark.parametrize("side", ["short", "long"])
def test_product_is_that_of_the_matrices_as_the_leaf_lies_in_memory(side):
    view = MatrixView.of((5, 6, 8), MatrixAxes(1, 2), side)
    random = np.random.default_rng(0)
    P, N = random.standard_normal((5, view.m, 2)), random.standard_normal((5, 2, view.n))
    product = jax.vmap(view.product)(P, N)
    np.testing.assert_allclose(product, view.in_memory(P @ N), rtol=1e-4, atol=1e-5)
    assert view.flipped == (side == "long")


@pytest.mark.parametrize("shape", [(16, 32), (32, 32)])
def test_fold_of_a_kernel_is_a_reshape(shape):
    view = MatrixView.of(shape, MatrixAxes(0, 1))
    assert "transpose" not in str(jax.make_jaxpr(view.fold)(jnp.ones(shape)))


@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 16, 32), MatrixAxes(1, 2)), ((16, 5, 32), MatrixAxes(0, 2))]
)
def test_matrix_copies_one_matrix_not_the_stack(shape, axes):
    view = MatrixView.of(shape, axes, "long")
    jaxpr = jax.make_jaxpr(view.matrix)(jnp.ones(shape), 3)
    assert max(out.aval.size for eqn in jaxpr.eqns for out in eqn.outvars) == 16 * 32


def test_view_works_under_strict_promotion_and_x64():
    view = MatrixView.of((5, 2, 3, 4), MatrixAxes(-2, -1))
    x = numbered((5, 2, 3, 4))
    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(True):
        for index in (np.int32(7), np.int64(7), 7):
            np.testing.assert_array_equal(jax.jit(view.matrix)(x, index), view.fold(x)[7])


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        (MatrixAxes(0, 3), "axis 3 of output_axis is out of range"),
        (MatrixAxes(-4, 1), "axis -4 of reduction_axis is out of range"),
        (MatrixAxes(0, (1, 0)), "an axis is repeated"),
        (MatrixAxes(2, -1), "an axis is repeated"),
        (MatrixAxes((), 1), "reduction_axis is neither an int nor a tuple of at least one"),
        (MatrixAxes(0, 1.0), "output_axis is neither an int"),
    ],
)
def test_axes_that_do_not_fit_are_refused_by_name(axes, problem):
    params = {"layer": {"w": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match=problem):
        MatrixView.of((2, 3, 4), axes)
    with pytest.raises(ValueError, match=rf"leaf 'layer/w' of shape \(2, 3, 4\): {problem}.*None"):
        axes_by_path(params, {"w$": axes})


def test_sizes_and_sides_that_make_no_view():
    with pytest.raises(ValueError, match="size 0"):
        MatrixView.of((0, 3), MatrixAxes(0, 1))
    with pytest.raises(
        ValueError, match="side='left' must be one of 'short', 'both', 'long', 'reduction'"
    ):
        MatrixView.of((2, 3), MatrixAxes(0, 1), "left")


# Paths


# names that optimizer states, boxes and adapters have in them, too
AWKWARD = ["mu", "nu", "R", "I", "J", "basis", "inner", "value", "count", "trace", "magnitude"]
LEAF = jax.ShapeDtypeStruct((6, 8), jnp.float32)
FIELDS = [(name, Any) for name in AWKWARD]
Tuple = NamedTuple("Tuple", FIELDS)
Struct = type("Struct", (struct.PyTreeNode,), {"__annotations__": dict(FIELDS)})
Dataclass = jax.tree_util.register_dataclass(dataclasses.make_dataclass("Dataclass", FIELDS))


def named(make=lambda: LEAF):
    return {name: make() for name in AWKWARD}


def nnx_module():
    module = nnx.Module()
    for name in AWKWARD:
        setattr(module, name, nnx.Param(jnp.ones(LEAF.shape)))
    return module


def equinox_module():
    eqx = pytest.importorskip("equinox")
    return type("Layer", (eqx.Module,), {"__annotations__": dict(FIELDS)})


TREES = {
    "dict": named,
    "int keys": lambda: {i: LEAF for i in range(3)},
    "list": lambda: [LEAF, LEAF],
    "tuple": lambda: (LEAF, LEAF),
    "NamedTuple": lambda: Tuple(**named()),
    "dataclass": lambda: Dataclass(**named()),
    "Flax struct": lambda: Struct(**named()),
    "NNX module": nnx_module,
    "NNX state": lambda: nnx.state(nnx_module(), nnx.Param),
    "NNX split": lambda: nnx.split(nnx_module(), nnx.Param, ...)[1],
    "NNX bare": lambda: nnx.as_pure(nnx.state(nnx_module(), nnx.Param)),
    "Linen boxes": lambda: named(lambda: nn.Partitioned(LEAF, names=("in", "out"))),
    "Equinox": lambda: equinox_module()(**named()),
}


@pytest.mark.parametrize("kind", TREES)
def test_every_leaf_has_its_own_name_and_is_a_kernel(kind):
    tree = TREES[kind]()
    names = {"int keys": "012", "list": "01", "tuple": "01"}.get(kind, AWKWARD)
    assert axes_by_path(tree) == {name: MatrixAxes(0, 1) for name in names}
    assert axes_by_path({"value": tree}) == {f"value/{name}": MatrixAxes(0, 1) for name in names}
    leaves, treedef = flatten_by_path(tree)
    assert jax.tree.structure(treedef.unflatten(leaves.values())) == jax.tree.structure(tree)


def test_only_boxes_lose_their_key():
    """A box in a box, a box around a tree, and fields called `value` above and below a box."""
    partitioned = nn.Partitioned(jnp.ones(2), names=("in",))
    boxed = {
        "twice": nnx.Param(partitioned),
        "tree": nnx.Param({"value": jnp.ones(2), "w": jnp.ones(3)}),
        "value": Dataclass(**dict.fromkeys(AWKWARD) | {"value": partitioned}),
        "gone": nnx.Param(optax.MaskedNode()),
    }
    assert list(flatten_by_path(boxed)[0]) == ["tree/value", "tree/w", "twice", "value/value"]


def test_is_leaf_stops_at_what_it_names_even_at_a_box():
    tree = {"a": nnx.Param({"b": (1, 2)}), "c": None}
    at_tuples, _ = flatten_by_path(tree, is_leaf=lambda x: isinstance(x, tuple) or x is None)
    assert at_tuples == {"a/b": (1, 2), "c": None}
    at_boxes, treedef = flatten_by_path(tree, is_leaf=lambda x: isinstance(x, nnx.Param))
    assert list(at_boxes) == ["a"]
    assert treedef.num_leaves == 1
    assert at_boxes["a"] is tree["a"]


def test_key_paths_of_bare_trees_are_those_of_jax():
    tree = [{"a": 1, "value": (2, None)}, Tuple(*AWKWARD)]
    assert leaves_with_path(tree) == jax.tree.leaves_with_path(tree)
    assert [leaf_path(keys) for keys, _ in leaves_with_path(tree)][:3] == [
        "0/a",
        "0/value/0",
        "1/mu",
    ]


def test_flatten_by_path_rebuilds_and_skips_absent_leaves():
    tree = {"b": [jnp.ones(2), None], "a": optax.MaskedNode(), "c": {"value": jnp.zeros(3)}}
    found, treedef = flatten_by_path(tree)
    assert list(found) == ["b/0", "c/value"]
    assert jax.tree.structure(treedef.unflatten(found.values())) == jax.tree.structure(tree)


def test_two_leaves_with_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        flatten_by_path({"a/b": 1, "a": {"b": 2}})


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_nnx_optimizer_shows_the_same_paths_at_init_and_update():
    seen = []
    tx = optax.GradientTransformation(
        lambda params: seen.append(axes_by_path(params)) or optax.EmptyState(),
        lambda updates, state, params: (
            seen.extend([axes_by_path(updates), axes_by_path(params)]) or (updates, state)
        ),
    )
    model = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 8))).sum())(model))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["layers/0/kernel"] == MatrixAxes(0, 1)
    assert seen[0]["norm/scale"] is None


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_boxes_have_the_paths_of_bare_leaves(box):
    x = jnp.ones((1, 3))
    init = nn.initializers.lecun_normal()
    boxed = nn.Dense(4, kernel_init=box(init, ("in", "out"))).init(jax.random.key(0), x)["params"]
    bare = nn.meta.unbox(boxed)
    assert jax.tree.structure(boxed) != jax.tree.structure(bare)
    assert axes_by_path(boxed) == axes_by_path(bare)
    assert axes_by_path(boxed) == {"bias": None, "kernel": MatrixAxes(0, 1)}
