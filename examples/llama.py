"""A Llama: RMSNorm, rotary positions, SwiGLU, causal attention, no biases.

    x = embed(tokens)
    x = x + attention(norm(x));  x = x + mlp(norm(x))      for each layer
    logits = lm_head(norm(x))

`SIZES` holds the configurations of the GaLore paper (arXiv:2403.03507, Table 5) and smaller ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes of a Llama.  `kv_heads < heads` is grouped-query attention.

    `interleaved_rope` rotates the features (0, 1), (2, 3), … of a head of size h instead of (0, h/2),
    (1, h/2 + 1), …: the same up to the order of the q and k features, and published weights have both.
    `tied` uses the embedding as the head, too.
    """

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int | None = None
    vocab: int = 256
    rope_theta: float = 10_000.0
    interleaved_rope: bool = False
    norm_eps: float = 1e-6
    tied: bool = False
    dtype: DTypeLike = jnp.float32  # parameters and activations; norms and softmax are float32


SIZES = {
    "tiny": LlamaConfig(32, 88, 1, 2),
    "nano": LlamaConfig(128, 344, 5, 4),
    "60m": LlamaConfig(512, 1376, 8, 8),
    "130m": LlamaConfig(768, 2048, 12, 12),
    "350m": LlamaConfig(1024, 2736, 24, 16),
    "1b": LlamaConfig(2048, 5461, 24, 32),
}


def linear(n_in: int, n_out: int, config: LlamaConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden,
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.dtype,
        rngs=rngs,
    )


def rope(x: Array, theta: float, interleaved: bool) -> Array:
    """Rotate pair k of x (batch, time, heads, dim) at position t by the angle t · theta^(−2k/dim)."""
    time, dim = x.shape[1], x.shape[3]
    angle = jnp.outer(jnp.arange(time), theta ** (-jnp.arange(0, dim, 2) / dim))[None, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pair_axis = -1 if interleaved else -2
    pair_shape = (dim // 2, 2) if interleaved else (2, dim // 2)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:3], *pair_shape)
    a, b = jnp.take(pairs, 0, pair_axis), jnp.take(pairs, 1, pair_axis)
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], pair_axis)
    return rotated.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.head_dim = config.hidden // config.heads
        self.kv_heads = config.kv_heads or config.heads
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = linear(config.hidden, config.hidden, config, rngs)
        self.k_proj = linear(config.hidden, kv_width, config, rngs)
        self.v_proj = linear(config.hidden, kv_width, config, rngs)
        self.o_proj = linear(config.hidden, config.hidden, config, rngs)

    def __call__(self, x: Array) -> Array:
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rope(y, self.config.rope_theta, self.config.interleaved_rope) for y in (q, k))
        return self.o_proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class SwiGLU(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate_proj = linear(config.hidden, config.ffn, config, rngs)
        self.up_proj = linear(config.hidden, config.ffn, config, rngs)
        self.down_proj = linear(config.ffn, config.hidden, config, rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Token ids (batch, time) to logits (batch, time, vocab); between them x is (batch, time, hidden).

    Example:
        >>> model = Llama(SIZES["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 256)
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(
            config.vocab,
            config.hidden,
            dtype=config.dtype,
            param_dtype=config.dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = rms_norm(config, rngs)
        if not config.tied:
            self.lm_head = linear(config.hidden, config.vocab, config, rngs)
        self.tied = config.tied

    def __call__(self, tokens: Array) -> Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        head = self.embed.attend if self.tied else self.lm_head
        return head(self.norm(x)).astype(jnp.float32)


def abstract_llama(config: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and parameter shapes; allocates nothing, so a laptop does the arithmetic for 1B."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)


def init_params(config: LlamaConfig, seed: int) -> nnx.State:
    """Random parameters."""
    return nnx.state(Llama(config, rngs=nnx.Rngs(seed)), nnx.Param)
