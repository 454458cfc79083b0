"""Flax Linen: any optimizer of this library is the `tx` of a `TrainState`.

    pip install -e . flax        # run with flax 0.12.8, jax 0.10.2

The model learns the beginning of this page by heart. Its two layers are scanned, so that each kernel is a stack: every
layer has a basis of its own. `describe` shows the layer axis as b.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import optax_lowrank as ol

TOKENS = jnp.array(list(__doc__.encode()[: 8 * 33])).reshape(8, 33)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.RMSNorm()(x), mask=mask)
        up = nn.gelu(nn.Dense(4 * width, name="up")(nn.RMSNorm()(x)))
        return x + nn.Dense(width, name="down")(up), None


class Transformer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(128, self.width)(tokens) + nn.Embed(32, self.width)(jnp.arange(32))[None]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return nn.Dense(128, name="head")(x)


@jax.jit
def train_step(state, tokens):
    def loss(params):
        logits, targets = state.apply_fn({"params": params}, tokens[:, :-1]), tokens[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def main():
    model = Transformer(64)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS[:, :-1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=ol.fira(1e-2, rank=8))
    print(ol.describe(params, rank=8))

    losses = []
    for _ in range(20):
        state, loss = train_step(state, TOKENS)
        losses.append(loss)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0] - 0.5

    # Active: bases of rank 8, one a layer, in the state that trained, which is smaller than AdamW's.
    report = ol.memory_report(state.tx, state.params, state.opt_state)
    print(report)
    kernels = {f"attention/{name}" for name in ("query", "key", "value", "out")} | {"up", "down"}
    bases = ol.diagnostics(state.opt_state)
    assert bases.keys() == {f"layers/{name}/kernel" for name in kernels}
    assert all(basis.rank.tolist() == [8, 8] for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
