"""Flax NNX: any optimizer of this library goes into `nnx.Optimizer` as it is.

    pip install -e . flax        # run with flax 0.12.8, jax 0.10.2

The model learns the beginning of this page by heart. `nnx.Optimizer` boxes the state's arrays as variables; the reports
of the library look into the boxes.
"""

import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowrank as ol

TOKENS = jnp.array(list(__doc__.encode()[: 8 * 33])).reshape(8, 33)


class Transformer(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(128, width, rngs=rngs)
        self.position = nnx.Embed(32, width, rngs=rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, 128, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens))
        x = x + self.down(nnx.gelu(self.up(self.norm(x))))
        return self.head(x)


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss(model):
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main():
    model = Transformer(64, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ol.fira(1e-2, rank=8), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    print(ol.describe(params, rank=8))

    losses = [train_step(model, optimizer, TOKENS) for _ in range(20)]
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0] - 0.5

    # Active: bases of rank 8, of these leaves, in the state that trained, which is smaller than AdamW's.
    report = ol.memory_report(optimizer.tx, params, optimizer.opt_state)
    print(report)
    attention = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    bases = ol.diagnostics(optimizer.opt_state)
    assert bases.keys() == attention | {"up/kernel", "down/kernel"}
    assert all(basis.rank == 8 for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
