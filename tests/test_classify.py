"""Rules: the layers of Flax, Equinox and Haliax are known, names mean what they say, and overrides win."""

import collections
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

from optax_lowrank import adapters, low_rank_muon, memory_report
from optax_lowrank.classify import (
    axes_by_path,
    check_rank,
    describe,
    matrix_axes,
    ranks_by_path,
)
from optax_lowrank.views import MatrixAxes, MatrixView

QUERY, OUT = MatrixAxes(0, (1, 2)), MatrixAxes((0, 1), 2)
KERNEL, OUT_IN = MatrixAxes(0, 1), MatrixAxes(1, 0)


def shaped(**shapes):
    """A flat tree of abstract leaves; `__` in a name stands for `/`."""
    return {
        name.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in shapes.items()
    }


def abstract(module, *inputs):
    """The parameters of a Linen module, nothing computed."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


# Rules


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


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


HEADS = (
    "head lm_head lmhead LMHead_0 mlm_head value_head readout bag_readout unembed unembedding Unembed_0 "
    "embed_out to_logits logits logits_dense classifier seq_classifier to_vocab"
)
POSITIONS = (
    "pos_embed pos_emb posemb position_embedding position_embeddings wpe pe pos pos_enc position positions "
    "wq_pos positional_encoding PositionalEncoding_0 position_table relative_position_bias_table "
    "rel_pos_h rel_pos_w"
)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("query/bias", (12, 64), None),
        ("rel_bias", (12, 64), None),
        ("ln_f/weight", (4, 64), None),
        ("attn_norm", (4, 64), None),
        ("PreNorm_0/Dense_0/kernel", (64, 32), MatrixAxes(0, 1)),
        ("token_embedder/embedding", (500, 64), None),
        ("embed_tokens/weight", (500, 64), None),
        ("time_embed/dense/kernel", (32, 64), MatrixAxes(0, 1)),
        ("wte", (500, 64), None),
        *[(f"decoder/{name}", (128, 64), None) for name in POSITIONS.split()],
        ("position_wise_feed_forward/kernel", (64, 256), KERNEL),
        ("pos_proj/kernel", (64, 64), KERNEL),
        ("positional_encoder/kernel", (64, 32), KERNEL),
        ("compose/kernel", (64, 32), KERNEL),
        *[(name, (64, 500), None) for name in HEADS.split()],
        *[(f"decoder/{name}/kernel", (64, 500), None) for name in HEADS.split()],
        ("heads/kernel", (64, 10), KERNEL),
        ("MultiHeadAttention_0/up/kernel", (64, 32), KERNEL),
        ("header/kernel", (64, 10), KERNEL),
        ("vocabulary_free/kernel", (64, 10), KERNEL),
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


@pytest.mark.parametrize("name", ["R", "I", "J"])
def test_recurrent_kernels_of_users_are_no_coordinates(name):
    shaped_as = lambda name: axes_by_path({"gru": {name: np.ones((9, 3, 5))}})["gru/" + name]
    assert shaped_as(name) == shaped_as("w") == MatrixAxes(0, 2)
    assert axes_by_path({"gru": {"kernel": {name: np.ones((9, 3, 5))}}})[
        f"gru/kernel/{name}"
    ] == MatrixAxes(0, 2)


def test_factors_of_adapters_are_matrices_whatever_their_weight_is_called():
    """Also more layers than ρ, and with the magnitudes masked away, as `optax.partition` does."""
    params = {"embedding": jnp.ones((9, 8, 7)), "up/w": jnp.ones((8, 6)), "I": jnp.ones((5, 8, 8))}
    adapter = adapters.init(params, rank=2, axes={"embedding": MatrixAxes(1, 2)})
    axes = axes_by_path(adapter)
    assert [axes.pop(f"{path}/magnitude") for path in params] == [None, None, None]
    assert axes == {
        "I/I": MatrixAxes(1, 2),
        "I/J": MatrixAxes(1, 2),
        "embedding/I": MatrixAxes(1, 2),
        "embedding/J": MatrixAxes(1, 2),
        "up/w/I": KERNEL,
        "up/w/J": KERNEL,
    }
    masked = {path: parts | {"magnitude": optax.MaskedNode()} for path, parts in adapter.items()}
    assert axes_by_path(masked) == axes


EMBEDDING = {"tok": {"embedding": np.ones((50, 8))}}


@pytest.mark.parametrize(
    ("others", "head"),
    [
        ({}, True),
        ({"up": np.ones((8, 32)), "down": np.ones((32, 8))}, True),
        ({"wpe": np.ones((16, 8)), "up": np.ones((8, 16))}, True),
        # a feed-forward layer as wide as the vocabulary is large: its second matrix takes that in
        ({"down": np.ones((50, 8))}, False),
        ({"down": np.ones((3, 50, 8))}, False),
    ],
)
def test_a_matrix_onto_the_vocabulary_is_a_head(others, head):
    axes = axes_by_path(EMBEDDING | others | {"decoder": np.ones((8, 50))})
    assert axes.pop("decoder") == (None if head else KERNEL)
    # the position table's size is no vocabulary
    matrices = {path for path, found in axes.items() if found is not None}
    assert matrices == others.keys() - {"wpe"}


def test_what_is_no_head_by_vocabulary():
    others = {"d": (7, 50), "v": (8, 49), "stack": (3, 8, 50), "square": (8, 8), "table": (50, 9)}
    tree = EMBEDDING | {name: np.ones(shape) for name, shape in others.items() if name != "table"}
    assert [path for path, found in axes_by_path(tree).items() if found is None] == [
        "tok/embedding"
    ]
    small = {"tok": {"embedding": np.ones((6, 8))}, "up": np.ones((8, 6))}  # v < d
    assert axes_by_path(small)["up"] == KERNEL
    tree = EMBEDDING | {"decoder": np.ones((8, 50))}
    assert axes_by_path(tree, {"decoder": KERNEL})["decoder"] == KERNEL
    # an embedding that is projected is a matrix like others
    assert axes_by_path(tree, {"tok": KERNEL})["decoder"] == KERNEL
    assert "head: its output is a vocabulary" in describe(tree)


def test_the_matrices_of_a_tree_alone_are_matrices():
    tree = EMBEDDING | {"up": np.ones((8, 32)), "down": np.ones((32, 8)), "x": np.ones((8, 50))}
    whole = {path: found for path, found in axes_by_path(tree).items() if found is not None}
    assert whole.keys() == {"up", "down"}
    for kept in whole:
        part = {path: leaf if path == kept else optax.MaskedNode() for path, leaf in tree.items()}
        assert axes_by_path(part) == {kept: whole[kept]}


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox")


def test_equinox_weights_are_output_first(eqx):
    key = jax.random.key(0)
    model = {
        "mlp": eqx.nn.MLP(3, 4, width_size=5, depth=1, activation=jax.nn.relu, key=key),
        "attention": eqx.nn.MultiheadAttention(2, 8, key=key),
        "conv": eqx.nn.Conv2d(3, 4, 5, key=key),
        "up": eqx.nn.ConvTranspose1d(3, 4, 5, key=key),
        "cell": eqx.nn.GRUCell(3, 4, key=key),
        "tok": eqx.nn.Embedding(50, 8, key=key),
        "decoder": eqx.nn.Linear(8, 50, key=key),
        "lm_head": eqx.nn.Linear(8, 51, key=key),
        "norm": eqx.nn.LayerNorm((3, 4)),
        "kernel": jnp.ones((3, 4)),
    }
    axes = axes_by_path(model)  # the activation is a leaf, too
    assert {path: found for path, found in axes.items() if found is not None} == {
        "mlp/layers/0/weight": OUT_IN,
        "mlp/layers/1/weight": OUT_IN,
        **{f"attention/{name}_proj/weight": OUT_IN for name in ("query", "key", "value", "output")},
        "conv/weight": MatrixAxes((1, 2, 3), 0),
        "up/weight": MatrixAxes((1, 2), 0),
        "cell/weight_ih": OUT_IN,
        "cell/weight_hh": OUT_IN,
        "kernel": KERNEL,
    }
    text = describe(model)
    assert re.search(r"mlp/layers/0/weight .* Equinox Linear\n", text)
    assert re.search(r"decoder/weight .* head: its output is a vocabulary\n", text)


def test_equinox_layers_stacked_masked_alone_and_as_gradients(eqx):
    linear = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    assert axes_by_path(linear) == {"weight": OUT_IN, "bias": None}
    stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))
    stack = stack(jax.random.split(jax.random.key(0), 5))
    assert axes_by_path(stack) == {"weight": MatrixAxes(2, 1), "bias": None}
    grads = eqx.filter_grad(lambda layer: jnp.sum(layer(jnp.ones(3))))(linear)
    assert axes_by_path(grads) == axes_by_path(linear)
    masked = eqx.tree_at(lambda layer: layer.bias, linear, optax.MaskedNode())
    assert axes_by_path(masked) == {"weight": OUT_IN}
    named = type("Mine", (eqx.nn.Linear,), {})(3, 4, key=jax.random.key(0))
    assert axes_by_path({"layer": named})["layer/weight"] == OUT_IN


def test_classes_that_only_share_a_name_with_equinox_are_not_its_layers():
    linear = dataclasses.make_dataclass("Linear", [("weight", Any)])
    linear = jax.tree_util.register_dataclass(linear)
    assert axes_by_path(linear(np.ones((3, 4)))) == {"weight": KERNEL}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class NamedArray:
    """Haliax's, as far as the rules look: one array, and the names of its axes."""

    __module__ = "haliax.core"
    array: Any
    axis_names: tuple[str, ...]

    def tree_flatten(self):
        return (self.array,), self.axis_names

    @classmethod
    def tree_unflatten(cls, axis_names, children):
        return cls(*children, axis_names)


@jax.tree_util.register_pytree_node_class
class OlderNamedArray:
    """The same of releases that keep axes, not names."""

    def __init__(self, array, axes):
        self.array, self.axes = array, axes

    def tree_flatten(self):
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        return cls(*children, axes)


OlderNamedArray.__name__, OlderNamedArray.__module__ = "NamedArray", "haliax.core"
Axis = collections.namedtuple("Axis", "name size")


def haliax_layer(kind, names, shape, **axes):
    fields = ["weight", "bias", *axes]
    layer = dataclasses.make_dataclass(kind, fields)
    layer.__module__ = "haliax.nn"
    layer = jax.tree_util.register_dataclass(layer, fields[:2], fields[2:])
    bias = NamedArray(jax.ShapeDtypeStruct((2, 5), jnp.float32), ("layers", "out"))
    return layer(NamedArray(jax.ShapeDtypeStruct(shape, jnp.float32), names), bias, **axes)


def test_haliax_layers_say_which_axes_are_in_and_out():
    """Stacked, with output axes first, several of them, and experts: shapes alone would mislead."""
    embed, heads, size = Axis("embed", 8), Axis("heads", 3), Axis("size", 4)
    query, out = ("layers", "heads", "size", "embed"), ("layers", "embed", "heads", "size")
    expert = ("layers", "expert", "in", "out")
    model = {
        "q_proj": haliax_layer("Linear", query, (2, 3, 4, 8), In=embed, Out=(heads, size)),
        "o_proj": haliax_layer("Linear", out, (2, 8, 3, 4), In=[heads, size], Out=embed),
        "by_name": haliax_layer("Linear", ("out", "in"), (6, 5), In={"in": 5}, Out={"out": 6}),
        "up": haliax_layer("MoELinear", expert, (2, 3, 8, 9), In=Axis("in", 8), Out=Axis("out", 9)),
        "conv": haliax_layer(
            "Conv",
            ("out", "embed", "H", "W"),
            (9, 8, 3, 3),
            In=embed,
            Out=Axis("out", 9),
            Spatial={"H": None, "W": None},
        ),
        "table": haliax_layer("Embedding", ("vocab", "embed"), (50, 8), Vocab=50, Embed=embed),
        "input_layernorm": {"weight": NamedArray(jnp.ones((2, 8)), ("layers", "embed"))},
    }
    axes = axes_by_path(model)
    assert {path: found for path, found in axes.items() if found is not None} == {
        "q_proj/weight": MatrixAxes(3, (1, 2)),
        "o_proj/weight": MatrixAxes((2, 3), 1),
        "by_name/weight": OUT_IN,
        "up/weight": MatrixAxes(2, 3),
        "conv/weight": MatrixAxes((1, 2, 3), 0),
    }
    assert re.search(r"q_proj/weight .* Haliax Linear\n", describe(model))


def test_haliax_arrays_that_keep_axes_instead_of_names():
    layer = haliax_layer("Linear", (), (), In=Axis("embed", 8), Out=Axis("out", 6))
    axes = Axis("out", 6), Axis("embed", 8)
    layer.weight = OlderNamedArray(jax.ShapeDtypeStruct((6, 8), jnp.float32), axes)
    assert axes_by_path(layer)["weight"] == OUT_IN


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
        ({"kernel": (0, 1)}, r"leaf 'kernel' is \(0, 1\); give MatrixAxes or None"),
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


def test_describe_groups_equal_layers():
    layer = {"kernel": (8, 32), "scale": (8,)}
    params = {"layers": [shaped(**layer)] * 12, "head": shaped(kernel=(8, 99))}
    assert describe(params).splitlines() == [
        "leaf             count  shape    b × m × n   axes b | m | n  treatment  why",
        "head/kernel          1  (8, 99)                              dense      head",
        "layers/*/kernel     12  (8, 32)  1 × 8 × 32  - | 0 | 1       projected  kernel",
        "layers/*/scale      12  (8,)                                 dense      bias or scale",
        "12 of 25 leaves projected: 3,072 of 3,960 parameters (77.6 %).",
    ]


def test_describe_tells_layers_of_another_rank_apart():
    text = describe({"layers": [shaped(kernel=(16, 32))] * 4}, rank={"layers/[13]": 4, "0": 2})
    assert [line.split("  ")[0] for line in text.splitlines()[1:-1]] == [
        "layers/0/kernel",
        "layers/1/kernel … layers/3/kernel",
        "layers/2/kernel",
    ]


def test_describe_of_nothing():
    assert describe({}).endswith("0 of 0 leaves projected: 0 of 0 parameters (0.0 %).")


# Ranks


VIEWS = {
    "up": MatrixView.of((64, 96), KERNEL),
    "down": MatrixView.of((200, 300), KERNEL),
    "small": MatrixView.of((6, 96), KERNEL),
}


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (16, (16, 16, 6)),
        (128, (64, 128, 6)),
        (0.25, (16, 48, 6)),  # 50 is nearer to 48 than to 56
        (0.99, (64, 200, 6)),
        (0.001, (8, 8, 6)),
        ({}, (64, 128, 6)),
        ({"up": 4}, (4, 128, 6)),
        ({"u": 4, "up|down": 0.3}, (4, 64, 6)),  # 60 is nearer to 64 than to 56
        ({"^d": 7, "down": 9, ".": 5}, (5, 9, 5)),  # a key that is a path speaks first
        ({"nothing": 3}, (64, 128, 6)),
    ],
)
def test_ranks(rank, expected):
    assert tuple(ranks_by_path(VIEWS, rank).values()) == expected


def test_a_share_is_of_the_projected_side():
    long = {"up": MatrixView.of((64, 96), KERNEL, "long")}
    assert ranks_by_path(long, 0.5) == {"up": 48}


def test_patterns_of_ranks_that_match_nothing():
    with pytest.raises(ValueError, match=r"patterns of `rank` 'atn' match no matrix.*'up', 'down'"):
        ranks_by_path(VIEWS, {"up": 4, "atn": 3}, strict=True)
    with pytest.raises(ValueError, match=r"'kernel\(' is no regular expression"):
        ranks_by_path(VIEWS, {"kernel(": 3})


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "`rank` must be positive, got 0"),
        (-1, ValueError, "`rank` must be positive, got -1"),
        ({"up": 0}, ValueError, "`rank` must be positive, got 0 for 'up'"),
        (2.5, TypeError, r"`rank` must be an int, got 2\.5\. Keep it static"),
        (1.0, TypeError, r"`rank` must be an int, got 1\.0"),
        (0.0, TypeError, r"`rank` must be an int, got 0\.0"),
        (float("nan"), TypeError, "`rank` must be an int, got nan"),
        (True, TypeError, "`rank` must be an int, got True"),
        ("8", TypeError, "`rank` must be an int, got '8'"),
        (None, TypeError, "`rank` must be an int, got None"),
        ({"up": True}, TypeError, "`rank` must be an int, got True for 'up'"),
        ({3: 4}, TypeError, "`rank` must be an int"),
    ],
)
def test_values_that_are_no_rank(rank, error, message):
    for use in (check_rank, lambda rank: ranks_by_path(VIEWS, rank)):
        with pytest.raises(error, match=message):
            use(rank)


def test_describe_and_optimizers_project_the_same():
    """Half of the longer side is more than the shorter one, which says whether a matrix is too small."""
    params = shaped(up=(24, 64), tiny=(8, 64))
    report = memory_report(low_rank_muon(0.1, rank=0.5), params)
    assert [report.groups[path].projected for path in ("up", "tiny")] == [True, False]
    lines = str(describe(params, rank=0.5, side="long"))
    assert "rank 24" in lines
    assert lines.count("min(m, n) <= rank") == 1


def test_describe_shows_ranks_that_differ():
    params = shaped(up=(64, 96), down=(96, 64), tiny=(6, 64), bias=(64,))
    assert describe(params, rank={"up": 0.25, "down": 80}, side="both").splitlines() == [
        "leaf  shape     b × m × n    axes b | m | n  treatment  why",
        "bias  (64,)                                  dense      bias or scale",
        "down  (96, 64)  1 × 64 × 96  - | 1 | 0       dense      min(m, n) <= rank",
        "tiny  (6, 64)   1 × 6 × 64   - | 0 | 1       dense      min(m, n) <= rank",
        "up    (64, 96)  1 × 64 × 96  - | 0 | 1       rank 16    kernel",
        "1 of 4 leaves projected: 6,144 of 12,736 parameters (48.2 %).",
    ]
    with pytest.raises(TypeError, match="`rank` must be an int"):
        describe(params, rank=True)
