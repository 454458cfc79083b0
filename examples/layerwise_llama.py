"""A Llama whose layers are updated inside the backward pass: bytes of the training step, and a small run.

    python examples/layerwise_llama.py                                # bytes for 130M, then 30 steps of nano
    python examples/layerwise_llama.py --size 1b --dtype bfloat16     # nothing of that size is allocated

The ordinary step has the gradients of all layers at once; the layer-wise one of a single layer.  Both keep
only the inputs of the layers from the forward pass, and neither clips by the global norm.
"""

import os

# Threaded LAPACK beside any busy process is slower by orders of magnitude; read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import text
from flax import nnx
from llama import SIZES, Block, Llama, LlamaConfig

import optax_lowrank


class Parts(NamedTuple):
    """Of parameters, gradients or optimizer states: the layers, stacked, and embedding, last norm and head."""

    layers: Any
    ends: Any


Step = Callable[[Parts, Parts, jax.Array], tuple[Parts, Parts, jax.Array]]


class StackedLlama:
    """The functions of a Llama with parameters in `Parts`."""

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.ends_config = dataclasses.replace(config, layers=0)
        self.graphs = nnx.eval_shape(lambda: self.split(jax.random.key(0)))[0]

    def split(self, key: jax.Array) -> tuple[Parts, Parts]:
        """Graphs and parameters of one layer, and of the model without layers."""
        layer = nnx.split(Block(self.config, rngs=nnx.Rngs(key)), nnx.Param)
        ends = nnx.split(Llama(self.ends_config, rngs=nnx.Rngs(key)), nnx.Param)
        return Parts(layer[0], ends[0]), Parts(layer[1], ends[1])

    def init(self, seed: int) -> Parts:
        keys = jax.random.split(jax.random.key(seed), self.config.layers)
        layers = jax.vmap(lambda key: self.split(key)[1].layers)(keys)
        return Parts(layers, self.split(jax.random.key(seed))[1].ends)

    def embed(self, ends: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs.ends, ends).embed(tokens[:, :-1])

    def block(self, layer: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs.layers, layer)(x)

    def head_loss(self, ends: nnx.State, x: jax.Array, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(self.graphs.ends, ends)
        logits = model.lm_head(model.norm(x)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def ordinary_step(model: StackedLlama, tx: Parts) -> tuple[Callable[[Parts], Parts], Step]:
    """`init` of the optimizer states and the step: the whole gradient, then the update."""

    def loss_fn(params, tokens):
        def forward(x, layer):
            return jax.checkpoint(model.block)(layer, x), None

        x, _ = jax.lax.scan(forward, model.embed(params.ends, tokens), params.layers)
        return model.head_loss(params.ends, x, tokens)

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        layers, layers_state = apply(tx.layers, grads.layers, state.layers, params.layers)
        ends, ends_state = apply(tx.ends, grads.ends, state.ends, params.ends)
        return Parts(layers, ends), Parts(layers_state, ends_state), loss

    init = lambda params: Parts(tx.layers.init(params.layers), tx.ends.init(params.ends))
    return init, step


def layerwise_step(model: StackedLlama, tx: Parts) -> tuple[Callable[[Parts], Parts], Step]:
    """The same, with the update of the layers inside the backward pass."""

    def step(params, state, tokens):
        x, pull = jax.vjp(lambda ends: model.embed(ends, tokens), params.ends)
        done = optax_lowrank.layerwise_step(
            block=model.block,
            tx=tx.layers,
            layers=params.layers,
            state=state.layers,
            x=x,
            head_loss=lambda ends, x: model.head_loss(ends, x, tokens),
            head=params.ends,
        )
        grads = jax.tree.map(jnp.add, done.head_grads, pull(done.x_grad)[0])
        ends, ends_state = apply(tx.ends, grads, state.ends, params.ends)
        return Parts(done.layers, ends), Parts(done.state, ends_state), done.loss

    init = lambda params: Parts(jax.vmap(tx.layers.init)(params.layers), tx.ends.init(params.ends))
    return init, step


def apply(tx: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def peak_bytes(model: StackedLlama, init: Callable[[Parts], Parts], step: Step) -> int:
    """What the compiled step holds at most, from shapes alone; an output in a donated buffer counts once."""
    params = jax.eval_shape(lambda: model.init(0))
    tokens = jax.ShapeDtypeStruct((1, 257), jnp.int32)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(init, params), tokens
    )
    memory = lowered.compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def table(config: LlamaConfig) -> str:
    model = StackedLlama(config)
    layers = jax.eval_shape(lambda: model.init(0)).layers
    grads = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
    lines = [
        f"gradients of the layers: {grads / 2**20:,.0f} MiB; peak of the step in MiB:",
        "",
        "| optimizer | ordinary | layer-wise | saved | of the gradients |",
        "|---|---|---|---|---|",
    ]
    rank = config.hidden // 4
    optimizers = {
        "adamw": optax.adamw(1e-3),
        "galore": optax_lowrank.galore(1e-3, rank=rank),
        "fira": optax_lowrank.fira(1e-3, rank=rank),
    }
    for name, tx in optimizers.items():
        both = Parts(tx, optax.adamw(1e-3))
        before, after = (
            peak_bytes(model, *make(model, both)) for make in (ordinary_step, layerwise_step)
        )
        sizes = (f"{size / 2**20:,.0f}" for size in (before, after, before - after))
        lines.append(f"| {name} | {' | '.join(sizes)} | {(before - after) / grads:.0%} |")
    return "\n".join(lines)


def train(config: LlamaConfig, steps: int) -> list[float]:
    model = StackedLlama(config)
    tokens = text.tokenize(text.read_corpus(), seq_len=128)
    tx = Parts(optax_lowrank.fira(1e-2, rank=config.hidden // 4), optax.adamw(3e-3))
    init, step = layerwise_step(model, tx)
    step = jax.jit(step, donate_argnums=(0, 1))
    params = model.init(0)
    state, losses = init(params), []
    for i in range(steps):
        params, state, loss = step(params, state, tokens.batch(0, i, 16, 128))
        losses.append(float(loss))
        if i % 10 == 9:
            print(f"step {i + 1:4d}   loss {loss:.3f}")
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--size", choices=SIZES, default="130m", help="whose bytes are counted")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--steps", type=int, default=30, help="of the model of size nano")
    args = p.parse_args(argv)
    print(f"Llama {args.size}, {args.dtype}, one sequence of 256 tokens, vocabulary of 32000")
    print(table(dataclasses.replace(SIZES[args.size], vocab=32_000, dtype=args.dtype)), "\n")
    return train(SIZES["nano"], args.steps)


if __name__ == "__main__":
    main()
