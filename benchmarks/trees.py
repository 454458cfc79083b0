"""The matrices of LLaMA layers, the optimizers that step them, and one compiled step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_lowrank as ol
from benchmarks.gradients import normal
from optax_lowrank import refit


class Size(NamedTuple):
    """Layers of a Llama and the rank they are projected to, a quarter of the width."""

    name: str
    layers: int
    hidden: int
    ffn: int

    @property
    def rank(self) -> int:
        return self.hidden // 4


REFITS = refit._refit_alike.__name__  # the program of refits, as jaxprs and HLO call it

# of the GaLore paper (arXiv:2403.03507, Table 5)
M60, M130 = Size("60M", 8, 512, 1376), Size("130M", 12, 768, 2048)
ONE_LAYER = (Size("one layer of 1B", 1, 2048, 5461), Size("one layer of 7B", 1, 4096, 11008))
QUICK = Size("quick", 1, 16, 16)  # one shape and few optimizers: compiles in a moment


def matrices(size: Size) -> dict[str, tuple[int, int]]:
    """Shapes of the seven matrices of a layer, (in, out)."""
    d, f = size.hidden, size.ffn
    return {**dict.fromkeys("qkvo", (d, d)), "gate": (d, f), "up": (d, f), "down": (f, d)}


def all_shapes(size: Size) -> list[tuple[int, int]]:
    """Of every matrix, in the order in which gradients are drawn."""
    return [shape for _ in range(size.layers) for shape in matrices(size).values()]


def apart(size: Size) -> dict[str, dict]:
    """Random gradients, each layer on its own."""
    drawn = normal(all_shapes(size))
    return {
        f"layers/{layer}/{name}": {"kernel": jnp.asarray(next(drawn))}
        for layer in range(size.layers)
        for name in matrices(size)
    }


def stacked(size: Size, grads: dict[str, dict]) -> dict[str, dict]:
    """The same gradients, the layers of each matrix in one array, as `nn.scan` keeps them."""
    of_layers = lambda name: [
        grads[f"layers/{layer}/{name}"]["kernel"] for layer in range(size.layers)
    ]
    return {f"layers/{name}": {"kernel": jnp.stack(of_layers(name))} for name in matrices(size)}


def shapes(size: Size, stack: bool, dtype=jnp.float32) -> dict[str, dict]:
    """`apart` or `stacked` as shapes, which allocate nothing."""
    leaf = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, dtype)}
    kernels = matrices(size).items()
    if stack:
        return {f"layers/{name}": leaf(size.layers, *shape) for name, shape in kernels}
    return {
        f"layers/{layer}/{name}": leaf(*shape)
        for layer in range(size.layers)
        for name, shape in kernels
    }


def optimizers(size: Size) -> dict[str, optax.GradientTransformation]:
    """All that are compared, at one rank."""
    r = {"rank": size.rank}
    found = {
        "optax.adamw": optax.adamw(1e-3),
        "optax.contrib.galore": optax.contrib.galore(1e-3, **r),
        "galore": ol.galore(1e-3, **r),
    }
    if size is QUICK:
        return found
    eight_bits = {"state_bits": 8, "basis_bits": 8}
    return found | {
        'galore(side="long")': ol.galore(1e-3, side="long", **r),
        "fira": ol.fira(1e-3, **r),
        "fira, 8 bits": ol.fira(1e-3, state_bits=8, **r),
        "apollo": ol.apollo(1e-3, **r),
        "natural_galore": ol.natural_galore(1e-3, **r),
        "adarankgrad": ol.adarankgrad(1e-3, **r),
        "gradnormlorp": ol.gradnormlorp(1e-3, **r),
        "gradnormlorp, 8 bits": ol.gradnormlorp(1e-3, **eight_bits, **r),
        "low_rank_muon": ol.low_rank_muon(1e-3, **r),
        "low_rank_muon(rank=0.35), 4 bits": ol.low_rank_muon(1e-3, rank=0.35, state_bits=4),
        "optax.contrib.muon": muon(1e-3),
    }


def muon(learning_rate: float) -> optax.GradientTransformation:
    """Optax's, of the matrices that the library sees, stacked ones, too, and Adam of all else."""

    def dimension_numbers(params):
        is_axes = lambda x: x is None or isinstance(x, ol.MatrixAxes)
        of = lambda x: x and optax.contrib.MuonDimensionNumbers(x.reduction_axis, x.output_axis)
        return jax.tree.map(of, ol.matrix_axes(params), is_leaf=is_axes)

    return optax.contrib.muon(learning_rate, muon_weight_dimension_numbers=dimension_numbers)


def step_of(tx: optax.GradientTransformation):
    """Update and apply: what a training step does with its gradients."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compile_step(tx: optax.GradientTransformation, params):
    """Traced and compiled, parameters and state donated as in a training loop."""
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, state, params).compile()


class Run:
    """An optimizer at work on gradients that it shares with others."""

    def __init__(self, tx: optax.GradientTransformation, grads):
        self.compiled = compile_step(tx, grads)
        self.grads, self.params, self.state = grads, jax.tree.map(jnp.copy, grads), tx.init(grads)

    def __call__(self):
        self.params, self.state = self.compiled(self.params, self.state, self.grads)
        return self.params

    def set_count(self, count: int):
        """At 0 the next step has a refresh; at 1 it has none, and the basis stays what it is."""
        jax.block_until_ready(self.state)
        self.state = jax.tree.map_with_path(
            lambda path, x: jnp.full_like(x, count) if _name(path) == "count" else x, self.state
        )


def _name(path) -> str:
    return getattr(path[-1], "name", "")
