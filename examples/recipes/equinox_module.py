"""Equinox: the optimizer sees the arrays of a module, `eqx.filter(model, eqx.is_inexact_array)`.

    pip install -e . equinox     # run with equinox 0.13.8, jax 0.10.2

The model learns the beginning of this page by heart. Equinox keeps weights as (out, in): the library knows its layers
by their class, so that `describe` shows the axis that a layer sums over first. A weight in a class of your own is taken
for (in, out), unless `weight_dimension_numbers` says otherwise.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import optax_lowrank as ol

TOKENS = jnp.array(list(__doc__.encode()[: 8 * 33])).reshape(8, 33)


class Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    position: eqx.nn.Embedding
    norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, width: int, key: jax.Array):
        keys = jax.random.split(key, 5)
        self.embed = eqx.nn.Embedding(128, width, key=keys[0])
        self.position = eqx.nn.Embedding(32, width, key=keys[1])
        self.norm = eqx.nn.RMSNorm(width)
        self.attention = eqx.nn.MultiheadAttention(4, width, key=keys[2])
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=keys[3])
        self.head = eqx.nn.Linear(width, 128, key=keys[4])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + self.position.weight
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h, jnp.tril(jnp.ones((32, 32), bool)))
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))
        return jax.vmap(self.head)(x)


def main():
    model = Transformer(64, jax.random.key(0))
    tx = ol.fira(1e-2, rank=8)
    params = eqx.filter(model, eqx.is_inexact_array)
    state = tx.init(params)
    print(ol.describe(params, rank=8))

    @eqx.filter_jit
    def train_step(model, state, tokens):
        def loss(model):
            logits, targets = jax.vmap(model)(tokens[:, :-1]), tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(20):
        model, state, loss = train_step(model, state, TOKENS)
        losses.append(loss)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0] - 0.5

    # Active: bases of rank 8, of these leaves, in the state that trained, which is smaller than AdamW's.
    report = ol.memory_report(tx, params, state)
    print(report)
    layers = {f"attention/{name}_proj" for name in ("query", "key", "value", "output")}
    bases = ol.diagnostics(state)
    assert bases.keys() == {f"{name}/weight" for name in layers | {"mlp/layers/0", "mlp/layers/1"}}
    assert all(basis.rank == 8 for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
