"""Bytes, from compiled programs and abstract shapes: nothing is allocated, and they are the same on every run."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowrank as ol
from benchmarks.tables import Options, Table, bars
from benchmarks.trees import (
    M60,
    M130,
    ONE_LAYER,
    QUICK,
    Size,
    compile_step,
    matrices,
    optimizers,
    shapes,
    step_of,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from lib import llama

BATCH, TIME, MICRO_BATCHES = 1, 256, 4
NAMES = (
    "optax.adamw",
    "optax.contrib.galore",
    "galore",
    "fira",
    "fira, 8 bits",
    "apollo",
    "gradnormlorp, 8 bits",
    "low_rank_muon",
    "low_rank_muon(rank=0.35), 4 bits",
    "optax.contrib.muon",
)


def memory(options: Options) -> Table:
    """A whole training step of a byte-level Llama, 1 × 256 tokens, layers recomputed, all donated but the tokens."""
    cases = [(QUICK, True)] if options.quick else [(M60, False), (M60, True), (M130, True)]
    rows, peaks = [], {}
    for size, stack in cases:
        title = f"{size.name}, {'stacked' if stack else 'layers apart'}"
        model = Model(size, stack)
        peaks[title] = {}
        for name, step, state in _steps(model):
            stats = model.compile(step, state).memory_analysis()
            peak = (
                stats.argument_size_in_bytes
                + stats.output_size_in_bytes
                + stats.temp_size_in_bytes
                - stats.alias_size_in_bytes
            )
            peaks[title][name] = peak / 2**20
            sizes = (in_bytes(model.params), in_bytes(state), stats.temp_size_in_bytes)
            by_adamw = f"{peaks[title][name] / peaks[title]['optax.adamw']:.2f}×"
            rows.append((title, name, *map(mib, sizes), mib(peak), by_adamw))
    header = (
        "model",
        "optimizer",
        "parameters, MiB",
        "state, MiB",
        "temporaries, MiB",
        "peak, MiB",
    )
    note = (
        "From `compiled.memory_analysis()`: peak = arguments + outputs + temporaries − aliased. Gradients are among "
        "the temporaries, as large as the parameters but for the layer-wise step."
    )
    figure = bars("peak of a training step, MiB", peaks)
    return Table((*header, "peak by adamw"), rows, (note,), figure)


def _steps(model):
    """Name, training step and abstract optimizer state of everything that is compared on a model."""
    galore = functools.partial(ol.galore, 1e-3, rank=model.size.rank)
    names = NAMES[:1] if model.size is QUICK else NAMES
    txs = {name: tx for name, tx in optimizers(model.size).items() if name in names}
    if model.stack:
        txs.pop("optax.contrib.galore", None)  # takes no stacked layers: it would be plain Adam
    k = MICRO_BATCHES
    txs[f"galore(accumulate={k})"] = galore(accumulate=k)
    txs[f"optax.MultiSteps(galore, {k})"] = optax.MultiSteps(galore(), k)
    for name, tx in txs.items():
        yield name, model.step(tx), jax.eval_shape(tx.init, model.params)
    if model.stack:
        yield "galore, layer-wise", *model.layerwise(galore())


class Model:
    """An abstract Llama: its parameters are shapes, `outside` of the layers and in them, a list or stacked."""

    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32)

    def __init__(self, size: Size, stack: bool, **options):
        self.size, self.stack = size, stack
        heads = max(1, size.hidden // 64)
        config = llama.LlamaConfig(size.hidden, size.ffn, size.layers, heads, **options)
        parts = lambda make: nnx.split(nnx.eval_shape(make), nnx.Param)
        empty = dataclasses.replace(config, layers=0)
        self.shell, outside = parts(lambda: llama.Llama(empty, rngs=nnx.Rngs(0)))
        block, layer = parts(lambda: llama.Block(config, rngs=nnx.Rngs(0)))
        self.block = lambda layer, x: nnx.merge(block, layer)(x)
        longer = lambda x: jax.ShapeDtypeStruct((size.layers, *x.shape), x.dtype)
        layers = jax.tree.map(longer, layer) if stack else [layer] * size.layers
        self.params = {"outside": outside, "layers": layers}

    def embed(self, outside, tokens):
        return nnx.merge(self.shell, outside).embed(tokens)

    def head_loss(self, outside, x, tokens):
        model = nnx.merge(self.shell, outside)
        logits = model.lm_head(model.norm(x))[:, :-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    def loss(self, params, tokens):
        x, block = self.embed(params["outside"], tokens), jax.checkpoint(self.block)
        if self.stack:
            x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, params["layers"])
        else:
            for layer in params["layers"]:
                x = block(layer, x)
        return self.head_loss(params["outside"], x, tokens)

    def step(self, tx):
        def step(params, state, tokens):
            grads = jax.grad(self.loss)(params, tokens)
            return step_of(tx)(params, state, grads)

        return step

    def layerwise(self, tx):
        """The step that updates layer by layer during the backward pass, and its abstract state."""
        rest = optax.adam(1e-3)

        def step(params, state, tokens):
            outside = params["outside"]
            x, pull = jax.vjp(lambda outside: self.embed(outside, tokens), outside)
            head_loss = lambda outside, x: self.head_loss(outside, x, tokens)
            done = ol.layerwise_step(
                self.block, tx, params["layers"], state["layers"], x, head_loss, outside
            )
            grads = jax.tree.map(jnp.add, done.head_grads, *pull(done.x_grad))
            outside, rest_state = step_of(rest)(outside, state["outside"], grads)
            new = {"outside": outside, "layers": done.layers}
            return new, {"outside": rest_state, "layers": done.state}

        outside = jax.eval_shape(rest.init, self.params["outside"])
        layers = jax.eval_shape(jax.vmap(tx.init), self.params["layers"])
        return step, {"outside": outside, "layers": layers}

    def compile(self, step, state):
        jitted = jax.jit(step, donate_argnums=(0, 1))
        return jitted.lower(self.params, state, self.tokens).compile()


def temporaries(options: Options) -> Table:
    """Update and apply alone, bfloat16 parameters and gradients, layers of LLaMA-130M stacked."""
    size = QUICK if options.quick else M130
    params = shapes(size, stack=True, dtype=jnp.bfloat16)
    layer = 4 * max(map(math.prod, matrices(size).values()))
    leaf = layer * size.layers
    rows, values = [], {}
    for name, tx in optimizers(size).items():
        if name == "optax.contrib.galore":  # no stacked layers: it would be plain Adam
            continue
        temp = compile_step(tx, params).memory_analysis().temp_size_in_bytes
        values[name] = temp / layer
        state = in_bytes(jax.eval_shape(tx.init, params))
        rows.append((name, mib(state), mib(temp), f"{temp / layer:.1f}", f"{temp / leaf:.1f}"))
    header = (
        "optimizer",
        "state, MiB",
        "temporaries, MiB",
        "in largest matrices",
        "in largest leaves",
    )
    note = (
        f"Largest matrix: {mib(layer)} MiB in float32; largest leaf, {size.layers} of them: {mib(leaf)} MiB. "
        f"The parameters are {mib(in_bytes(params))} MiB in bfloat16."
    )
    return Table(header, rows, (note,), bars("temporaries, in largest matrices", {"": values}))


def state(options: Options) -> Table:
    """Optimizer state for the matrices alone, float32, r = d/4."""
    sizes = (QUICK,) if options.quick else (M60, M130, *ONE_LAYER)
    rows = []
    for size in sizes:
        params = shapes(size, stack=False)
        adamw = ol.memory_report(optax.adamw(1e-3), params).arrays
        for side in ("short", "long"):
            tx = ol.galore(1e-3, rank=size.rank, side=side)
            ours, formula = ol.memory_report(tx, params).arrays, formula_bytes(size, side)
            cells = (size.name, f'galore(side="{side}")', f"{ours:,}", f"{ours - formula:+,}")
            rows.append((*cells, f"{ours / adamw:.1%}"))
        contrib = jax.eval_shape(optax.contrib.galore(1e-3, rank=size.rank).init, params)
        arrays = in_bytes([x for x in jax.tree.leaves(contrib) if x.ndim])
        cells = (size.name, "optax.contrib.galore", f"{arrays:,}")
        rows.append((*cells, f"{arrays - formula_bytes(size, 'long'):+,}", f"{arrays / adamw:.1%}"))
    header = ("matrices", "optimizer", "bytes of arrays", "over 4 (m·r + 2·n·r)", "of adamw's")
    return Table(
        header, rows, ("Counters and statistics, a few numbers a matrix, are not counted.",)
    )


def formula_bytes(size: Size, side: str) -> int:
    """4 (m·r + 2·n·r) bytes a matrix, m the projected side."""
    one = 0
    for shape in matrices(size).values():
        m, n = sorted(shape, reverse=side == "long")
        one += 4 * size.rank * (m + 2 * n)
    return size.layers * one


def in_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
