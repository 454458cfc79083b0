"""Optimizer steps on the matrices of a Llama: time between and at refreshes, compile time, bytes."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowrank as ol
from benchmarks.timing import markdown, milliseconds, ratio, take_turns

LAYERS, HIDDEN, FFN, RANK = 8, 512, 1376, 128  # the GaLore paper's 60M model


def layer_kernels() -> dict[str, jax.Array]:
    """Random gradients of the 56 matrices of the 60M model, layers apart."""
    random = np.random.default_rng(0)
    names = ("q", "k", "v", "o")
    shapes = dict.fromkeys(names, (HIDDEN, HIDDEN)) | dict.fromkeys(("gate", "up"), (HIDDEN, FFN))
    shapes["down"] = (FFN, HIDDEN)
    return {
        f"layers/{layer}/{name}": {"kernel": jnp.asarray(random.standard_normal(shape, np.float32))}
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


OPTIMIZERS = {
    "optax.adamw": optax.adamw(1e-3),
    "optax.contrib.galore": optax.contrib.galore(1e-3, rank=RANK),
    "optax.contrib.muon": optax.contrib.muon(1e-3),
    'galore(side="long")': ol.galore(1e-3, rank=RANK, side="long"),
    "galore": ol.galore(1e-3, rank=RANK),
    "fira": ol.fira(1e-3, rank=RANK),
    "natural_galore": ol.natural_galore(1e-3, rank=RANK),
    "adarankgrad": ol.adarankgrad(1e-3, rank=RANK),
    "gradnormlorp": ol.gradnormlorp(1e-3, rank=RANK),
}


class Run:
    """One optimizer's compiled update-and-apply with donated buffers, as a training loop has it."""

    def __init__(self, tx, grads):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            grads, jax.eval_shape(tx.init, grads), grads
        )
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.temporary = self.compiled.memory_analysis().temp_size_in_bytes
        self.grads, self.params, self.state = grads, jax.tree.map(jnp.copy, grads), tx.init(grads)
        start = time.perf_counter()
        jax.block_until_ready(self())
        self.first_seconds = time.perf_counter() - start

    def __call__(self):
        self.params, self.state = self.compiled(self.params, self.state, self.grads)
        return self.params


def llama_60m() -> str:
    """Every optimizer on the matrices of the 60M model."""
    grads = layer_kernels()
    runs = {name: Run(tx, grads) for name, tx in OPTIMIZERS.items()}
    seconds = take_turns(runs, repeats=15)
    rows = []
    for name, run in runs.items():
        rows.append(
            (
                name,
                milliseconds(seconds[name]),
                f"{ratio(seconds[name], seconds['optax.adamw']):.2f}×",
                f"{ratio(seconds[name], seconds['optax.contrib.galore']):.2f}×",
                f"{1e3 * run.first_seconds:.0f}",
                f"{run.compile_seconds:.1f}",
                f"{sum(x.nbytes for x in jax.tree.leaves(run.state)) / 2**20:.1f}",
                f"{run.temporary / 2**20:.0f}",
            )
        )
    header = (
        "optimizer",
        "ms between refreshes",
        "by AdamW",
        "by contrib.galore",
        "ms with refresh",
    )
    return markdown((*header, "compile s", "state MiB", "temporaries MiB"), rows)
