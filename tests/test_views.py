"""Views: paths are the same boxed or bare, folding loses nothing, and the rules know the layers of Flax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from hypothesis import given, strategies as st

from optax_lowrank.views import (
    MatrixAxes,
    MatrixView,
    axes_by_path,
    describe,
    flatten_by_path,
    leaf_path,
    matrix_axes,
)

QUERY, OUT = MatrixAxes(0, (1, 2)), MatrixAxes((0, 1), 2)


def shaped(**shapes):
    """A flat tree of abstract leaves; `__` in a name stands for `/`."""
    return {
        name.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in shapes.items()
    }


def abstract(module, *inputs):
    """The parameters of a Linen module, nothing computed."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


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
    with pytest.raises(ValueError, match="side='left' must be 'short', 'long' or 'reduction'"):
        MatrixView.of((2, 3), MatrixAxes(0, 1), "left")


# Paths


def test_one_box_is_dropped_and_a_dict_key_value_stays():
    keys = jax.tree_util
    box = keys.GetAttrKey("value")
    assert leaf_path((keys.DictKey("a"), keys.SequenceKey(0), box)) == "a/0"
    assert leaf_path((keys.DictKey("a"), box, box)) == "a/value"
    assert leaf_path((keys.DictKey("a"), keys.DictKey("value"))) == "a/value"
    assert leaf_path((box,)) == leaf_path(()) == ""


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


# Rules


def test_linen_attention():
    x = jax.ShapeDtypeStruct((1, 5, 8), jnp.float32)
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    expected = {f"{name}/bias": None for name in ("query", "key", "value", "out")}
    expected |= {f"{name}/kernel": QUERY for name in ("query", "key", "value")}
    assert axes_by_path(abstract(module, x, x)) == expected | {"out/kernel": OUT}


def test_nnx_attention():
    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    axes = axes_by_path(nnx.state(module, nnx.Param))
    assert axes["query/kernel"] == axes["key/kernel"] == axes["value/kernel"] == QUERY
    assert axes["out/kernel"] == OUT
    assert {axes[f"{name}/bias"] for name in ("query", "key", "value", "out")} == {None}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(16, name="down")(nn.Dense(64, name="up")(nn.RMSNorm()(x))), None


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers(axis):
    """The layer axis is the batch axis, and stacked biases and scales are no matrices."""
    layers = nn.scan(Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)
    axes = axes_by_path(abstract(layers(), jnp.ones((1, 5, 16)), None))
    attention = "MultiHeadDotProductAttention_0"
    m = 1 - axis
    assert axes["up/kernel"] == axes["down/kernel"] == MatrixAxes(m, 2)
    assert axes[f"{attention}/query/kernel"] == MatrixAxes(m, (2, 3))
    if axis == 0:  # at axis 1 (heads, layers, hd, d) looks like (layers, heads, hd, d)
        assert axes[f"{attention}/out/kernel"] == MatrixAxes((1, 2), 3)
    dense = {path for path, found in axes.items() if found is None}
    assert dense == {path for path in axes if path.endswith(("bias", "scale"))}


def test_vmapped_nnx_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return Block(rngs)

    axes = axes_by_path(nnx.state(stack(nnx.Rngs(0)), nnx.Param))
    assert axes == {
        "layers/0/bias": None,
        "layers/0/kernel": MatrixAxes(1, 2),
        "layers/1/bias": None,
        "layers/1/kernel": MatrixAxes(1, 2),
        "norm/scale": None,
    }


class Vision(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 8)(tokens)
        x = nn.Conv(16, (3,))(x)
        x = nn.Conv(4, (3, 3))(x[..., None])
        x = nn.GroupNorm(2)(x)
        return nn.Dense(50, name="lm_head")(x)


def test_convolutions_embeddings_norms_and_heads():
    axes = axes_by_path(abstract(Vision(), jnp.ones((1, 6), int)))
    matrices = {path: found for path, found in axes.items() if found is not None}
    assert matrices == {
        "Conv_0/kernel": MatrixAxes((0, 1), 2),
        "Conv_1/kernel": MatrixAxes((0, 1, 2), 3),
    }


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("R", (2, 3, 1), MatrixAxes(1, 2)),
        ("mlp/up/kernel/R", (9, 3, 5), MatrixAxes(1, 2)),
        ("query/bias", (12, 64), None),
        ("rel_bias", (12, 64), None),
        ("ln_f/weight", (4, 64), None),
        ("attn_norm", (4, 64), None),
        ("PreNorm_0/Dense_0/kernel", (64, 32), MatrixAxes(0, 1)),
        ("token_embedder/embedding", (500, 64), None),
        ("embed_tokens/weight", (500, 64), None),
        ("time_embed/dense/kernel", (32, 64), MatrixAxes(0, 1)),
        ("wte", (500, 64), None),
        ("pos_embed", (1, 16, 64), None),
        ("logits_dense/kernel", (64, 500), None),
        ("head/kernel", (64, 10), None),
        ("heads/kernel", (64, 10), MatrixAxes(0, 1)),
        ("cls", (1, 1, 64), None),
        ("gain", (1, 64), None),
        ("gone", (0, 64), None),
        ("temperature", (), None),
        # attention: a missing layer axis, one at 0, one at 1, three kernels in one
        ("wq", (64, 4, 16), QUERY),
        ("attn/wo", (4, 16, 64), OUT),
        ("layers/k/kernel", (6, 64, 4, 16), MatrixAxes(1, (2, 3))),
        ("layers/k/kernel", (64, 6, 4, 16), MatrixAxes(0, (2, 3))),
        ("qkv/kernel", (64, 3, 4, 16), MatrixAxes(0, (2, 3))),
        ("layers/out/kernel", (6, 4, 16, 64), MatrixAxes((1, 2), 3)),
        # kernels that bear the names of attention and have no heads
        ("q_proj/kernel", (64, 64), MatrixAxes(0, 1)),
        ("layers/q_proj/kernel", (6, 64, 64), MatrixAxes(1, 2)),
        ("layers/k_proj/kernel", (6, 64, 16), MatrixAxes(1, 2)),
        ("layers/q_proj/kernel", (64, 6, 64), MatrixAxes(0, 2)),
        ("layers/o_proj/kernel", (6, 64, 64), MatrixAxes(1, 2)),
        # experts, more of them than a side is long; routers and shared experts are none
        ("MoeBlock_0/wi_0", (128, 6, 64, 32), MatrixAxes(2, 3)),
        ("MoeBlock_0/wo", (128, 6, 32, 64), MatrixAxes(2, 3)),
        ("moe/experts/up/kernel", (128, 64, 32), MatrixAxes(1, 2)),
        ("experts/3/up/kernel", (64, 32), MatrixAxes(0, 1)),
        ("MoeBlock_0/gate/kernel", (64, 6, 8), MatrixAxes(0, 2)),
        ("shared_experts/wi_0/kernel", (64, 6, 32), MatrixAxes(0, 2)),
        ("short_conv/kernel", (4, 1, 64), MatrixAxes((0, 1), 2)),
    ],
)
def test_rules(path, shape, axes):
    assert axes_by_path({path: jax.ShapeDtypeStruct(shape, jnp.float32)}) == {path: axes}


def test_only_shape_is_read():
    shape = (4, 6)
    leaves = [np.ones(shape), jnp.ones(shape), jax.ShapeDtypeStruct(shape, jnp.bfloat16)]
    assert axes_by_path([*leaves, 1.0, None]) == {
        **dict.fromkeys(["0", "1", "2"], MatrixAxes(0, 1)),
        "3": None,
    }


def test_matrix_axes_is_a_tree_like_params_and_its_own_override():
    params = nnx.state(Block(nnx.Rngs(0)), nnx.Param)
    axes = matrix_axes(params)
    assert axes_by_path(params, axes) == axes_by_path(nnx.as_pure(params), axes)
    assert axes_by_path(params, axes) == axes_by_path(params)
    assert matrix_axes({"w": np.ones((2, 3)), "b": np.ones(3), "gap": None}) == {
        "w": MatrixAxes(0, 1),
        "b": None,
        "gap": None,
    }


# Overrides


PARAMS = shaped(attn__kernel=(8, 2, 4), mlp__kernel=(8, 32), mlp__bias=(32,), lm_head=(8, 99))
RULED = axes_by_path(PARAMS)


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def test_a_tree_decides_every_leaf():
    axes = dict.fromkeys(PARAMS) | {"lm_head": MatrixAxes(1, 0), "attn/kernel": MatrixAxes(0, -1)}
    expected = axes | {"attn/kernel": MatrixAxes(0, 2)}
    assert axes_by_path(nested(PARAMS), nested(axes)) == expected
    assert axes_by_path(PARAMS, nested(axes)) == axes_by_path(nested(PARAMS), axes) == expected


@pytest.mark.parametrize(
    "foreign", [optax.contrib.GaLoreDimensionNumbers, optax.contrib.MuonDimensionNumbers]
)
def test_dimension_numbers_of_optax_are_axes(foreign):
    axes = dict.fromkeys(PARAMS) | {"attn/kernel": foreign(0, (1, 2))}
    expected = dict.fromkeys(PARAMS) | {"attn/kernel": QUERY}
    assert axes_by_path(nested(PARAMS), nested(axes)) == expected
    assert axes_by_path(PARAMS, {"attn": foreign(0, (1, 2))}) == RULED | {"attn/kernel": QUERY}


def test_patterns_override_the_rules_first_match_first():
    overrides = {"^attn/": QUERY, "kernel$": None, "head": MatrixAxes(0, 1)}
    assert axes_by_path(PARAMS, overrides) == {
        "attn/kernel": QUERY,
        "mlp/kernel": None,
        "mlp/bias": None,
        "lm_head": MatrixAxes(0, 1),
    }


def test_a_key_that_is_a_path_speaks_for_its_leaf():
    """So a flat tree of axes means what it says, even where one path is found in another."""
    params = shaped(w=(2, 3), wide=(2, 3), other=(2, 3))
    overrides = {"w": None, "wide": MatrixAxes(1, 0), "other": None}
    assert axes_by_path(params, overrides) == overrides


def test_a_function_sees_params_and_returns_either_kind():
    def all_but_heads(params):
        return jax.tree.map(lambda leaf: MatrixAxes(0, -1) if len(leaf.shape) > 1 else None, params)

    boxed = nnx.state(Block(nnx.Rngs(0)), nnx.Param)
    assert axes_by_path(boxed, all_but_heads) == axes_by_path(nnx.as_pure(boxed), all_but_heads)
    assert axes_by_path(nested(PARAMS), all_but_heads)["lm_head"] == MatrixAxes(0, 1)
    assert axes_by_path(PARAMS, lambda params: {"head": MatrixAxes(0, 1)}) == axes_by_path(
        PARAMS, {"head": MatrixAxes(0, 1)}
    )
    assert axes_by_path(PARAMS, lambda params: None) == RULED


@pytest.mark.parametrize(
    "overrides",
    [
        None,
        {"^mlp": None, "head": MatrixAxes(0, 1), "attn": QUERY},
        dict.fromkeys(PARAMS) | {"attn/kernel": QUERY},
        nested(dict.fromkeys(PARAMS) | {"attn/kernel": QUERY}),
    ],
)
@pytest.mark.parametrize("kept", PARAMS)
def test_masking_leaves_away_changes_no_answer(overrides, kept):
    whole = axes_by_path(nested(PARAMS), overrides)
    masked = {path: PARAMS[path] if path == kept else optax.MaskedNode() for path in PARAMS}
    assert axes_by_path(nested(masked), overrides, strict=False) == {kept: whole[kept]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"atn": None}, "'atn' match no leaf.*'attn/kernel', 'lm_head', 'mlp/bias', 'mlp/kernel'"),
        ({"kernel(": None}, r"'kernel\(' is no regular expression"),
        ({"kernel": (0, 1)}, "override of leaf 'kernel/0' is 0; give MatrixAxes or None"),
        ({"attn": {"kernel": None}}, "lacks 'lm_head', 'mlp/bias', 'mlp/kernel' and adds none"),
        (nested(dict.fromkeys([*PARAMS, "new/w"])), "lacks none and adds 'new/w'"),
        ({"bias": MatrixAxes(0, 1)}, r"leaf 'mlp/bias' of shape \(32,\): axis 1 of output_axis"),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(overrides, message):
    for use in (axes_by_path, matrix_axes, describe):
        with pytest.raises(ValueError, match=message):
            use(PARAMS, overrides)


# The table


def test_describe_says_what_how_and_why():
    text = describe(PARAMS, {"attn": MatrixAxes(0, 2)}, rank=4, side="long")
    assert text.splitlines() == [
        "leaf         shape      b × m × n   axes b | m | n  treatment  why",
        "attn/kernel  (8, 2, 4)  2 × 8 × 4   1 | 0 | 2       dense      min(m, n) <= rank",
        "lm_head      (8, 99)                                dense      head",
        "mlp/bias     (32,)                                  dense      bias or scale",
        "mlp/kernel   (8, 32)    1 × 32 × 8  - | 1 | 0       projected  kernel",
        "1 of 4 leaves projected: 256 of 1,144 parameters (22.4 %).",
    ]
    assert re.search(r"projected +override 'attn'", describe(PARAMS, {"attn": QUERY}))


def test_describe_of_nothing():
    assert describe({}).endswith("0 of 0 leaves projected: 0 of 0 parameters (0.0 %).")
