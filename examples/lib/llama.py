"""A Llama: RMSNorm, rotary positions, SwiGLU, causal attention, no biases.

    x = embed(tokens)
    x = x + attention(norm(x));  x = x + mlp(norm(x))      for each layer
    logits = lm_head(norm(x))

`SIZES` holds the configurations of the GaLore paper (arXiv:2403.03507, Table 5), smaller ones and LLaMA-13B.

What grows with time² or with time · vocab is computed in pieces that are recomputed backwards, where it is large:
neither all scores nor all logits are ever whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
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
    "micro": LlamaConfig(256, 688, 5, 8),
    "60m": LlamaConfig(512, 1376, 8, 8),
    "130m": LlamaConfig(768, 2048, 12, 12),
    "350m": LlamaConfig(1024, 2736, 24, 16),
    "1b": LlamaConfig(2048, 5461, 24, 32),
    "7b": LlamaConfig(4096, 11008, 32, 32),
    "13b": LlamaConfig(5120, 13824, 40, 40),
}
PIECE = 2**23  # entries of scores or logits that may live at a time: 32 MiB in float32


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
        return self.o_proj(causal_attention(q, k, v).reshape(x.shape))


def causal_attention(q: Array, k: Array, v: Array, piece: int = PIECE) -> Array:
    """Attention of (batch, time, heads, dim), a block of queries at a time if there are more than `piece` scores."""
    batch, time, heads, _ = q.shape
    blocks = min(time, -(-batch * heads * time * time // piece))
    if blocks == 1 or time % blocks:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    # wide outside of the loop, so that what each block adds to their gradients is summed in float32
    wide = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def block(start: Array, rows: Array, k: Array, v: Array) -> Array:
        mask = start + jnp.arange(rows.shape[1])[:, None] >= jnp.arange(time)[None]
        k, v = k.astype(rows.dtype), v.astype(rows.dtype)
        return jax.nn.dot_product_attention(rows, k, v, mask=mask[None, None])

    rows = jnp.moveaxis(q.reshape(batch, blocks, time // blocks, *q.shape[2:]), 1, 0)
    starts = jnp.arange(blocks) * (time // blocks)
    out = jax.lax.map(lambda args: block(*args, *wide), (starts, rows))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def cross_entropy(
    head: Callable[[Array], Array], x: Array, targets: Array, vocab: int, piece: int = PIECE
) -> Array:
    """Mean, in nats, of targets (batch, time) under the logits `head(x)`, of which at most `piece` live at a time."""
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    count = len(targets)

    def total(x: Array, targets: Array) -> Array:
        logits = head(x).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return jnp.sum(jnp.where(targets < 0, 0, losses))

    pieces = -(-count * vocab // piece)
    if pieces == 1:
        return total(x, targets) / count
    rows = -(-count // pieces)
    padding = pieces * rows - count  # marked by a target of -1
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(pieces, rows, -1)
    targets = jnp.pad(targets, (0, padding), constant_values=-1).reshape(pieces, rows)
    add = lambda sum_, piece: (sum_ + jax.checkpoint(total)(*piece), None)
    return jax.lax.scan(add, jnp.zeros([]), (x, targets))[0] / count


def over_data(x: Array) -> Array:
    """x (batch, …), its batch along the axis `data` of the mesh, where one is set.

    Weights are split over `data` too, and without this the compiler may move the batch instead of a weight.
    """
    if "data" not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


def whole_rows(table: Array) -> Array:
    """table (vocab, hidden), its columns not split where a mesh is set.

    They are split over `data`, and what tokens look up would be, too, before it is put with its rows of the batch.
    """
    if "data" not in jax.sharding.get_abstract_mesh().axis_names:
        return table
    return jax.lax.with_sharding_constraint(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


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
        return over_data(x + self.mlp(self.mlp_norm(x)))


def blocks(config: LlamaConfig, rngs: nnx.Rngs) -> Iterator[Block]:
    return (Block(config, rngs=rngs) for _ in range(config.layers))


class Llama(nnx.Module):
    """Token ids (batch, time) to logits (batch, time, vocab); between them x is (batch, time, hidden).

    Example:
        >>> model = Llama(SIZES["tiny"], rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8), jnp.int32)).shape
        (1, 8, 256)
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        blocks: Callable[[LlamaConfig, nnx.Rngs], Iterator[Block]] = blocks,
    ):
        self.embed = nnx.Embed(
            config.vocab,
            config.hidden,
            dtype=config.dtype,
            param_dtype=config.dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List(blocks(config, rngs))
        self.norm = rms_norm(config, rngs)
        if not config.tied:
            self.lm_head = linear(config.hidden, config.vocab, config, rngs)
        self.config = config

    def __call__(self, tokens: Array) -> Array:
        return self.head(self.hidden(tokens)).astype(jnp.float32)

    def hidden(self, tokens: Array) -> Array:
        """What the layers make of the tokens, (batch, time, hidden)."""
        x = over_data(jnp.take(whole_rows(self.embed.embedding[...]), tokens, axis=0))
        for layer in self.layers:
            x = layer(x)
        return x

    def head(self, x: Array) -> Array:
        return (self.embed.attend if self.config.tied else self.lm_head)(self.norm(x))

    def loss(self, x: Array, tokens: Array) -> Array:
        """Mean cross entropy, in nats per token, of what follows each position of x."""
        return cross_entropy(self.head, x, tokens, self.config.vocab)


def abstract_llama(config: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and parameter shapes; allocates nothing, so a laptop does the arithmetic for 1B."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)


def init_params(config: LlamaConfig, seed: int) -> nnx.State:
    """Random parameters."""
    return nnx.state(Llama(config, rngs=nnx.Rngs(seed)), nnx.Param)


def init_stacked(config: LlamaConfig, seed: int) -> tuple[nnx.State, nnx.State]:
    """The same parameters with the layers stacked, (layers, ...) a leaf, and those around them.

    One layer after the other is written to the stack: there are never two copies of them.
    """
    stack: list[nnx.State] = []

    @functools.partial(jax.jit, donate_argnums=0)
    def write(stack: nnx.State, layer: nnx.State, i: int) -> nnx.State:
        return jax.tree.map(lambda x, y: x.at[i].set(y), stack, layer)

    def written(config: LlamaConfig, rngs: nnx.Rngs) -> Iterator[Block]:
        for i, block in enumerate(blocks(config, rngs)):
            layer = nnx.state(block, nnx.Param)
            if not stack:
                shape = lambda x: jnp.zeros((config.layers, *x.shape), x.dtype)
                stack.append(jax.tree.map(shape, layer))
            stack[0] = write(stack[0], layer, i)
        return iter(())

    ends = nnx.state(Llama(config, rngs=nnx.Rngs(seed), blocks=written), nnx.Param)
    return stack[0], ends
