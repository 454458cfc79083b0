"""Train a small transformer on the shipped book with `optax_lowrank.fira`, on one page.

python examples/train_minimal.py
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threaded LAPACK beside a busy process is slow

import lzma
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_lowrank

WIDTH, HEADS, LAYERS, BATCH, TIME = 128, 4, 2, 16, 64
BOOK = Path(__file__).parent / "data" / "kjv.txt.xz"


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm, self.mlp_norm = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(256, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(TIME, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(TIME))[None]
        for layer in self.layers:
            x = layer(x, nnx.make_causal_mask(tokens))
        return self.lm_head(self.norm(x))


@nnx.jit
def train_step(model, optimizer, batch):
    def loss_fn(model):
        logits = model(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def main(steps: int = 200) -> float:
    text = np.frombuffer(lzma.decompress(BOOK.read_bytes()), np.uint8)
    model = Transformer(nnx.Rngs(0))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps)
    tx = optax_lowrank.fira(rate, rank=WIDTH // 4, dense_learning_rate=3e-3)
    print(optax_lowrank.memory_report(tx, nnx.state(model, nnx.Param)))

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        start = random.integers(0, len(text) - TIME, (BATCH, 1))
        loss = train_step(model, optimizer, text[start + np.arange(TIME + 1)[None]].astype(int))
        if step == 1 or step % 20 == 0:
            print(f"step {step:4d}   loss {loss:.3f} nats per byte", flush=True)
    return float(loss)


if __name__ == "__main__":
    main()
