"""What a method of fine-tuning trains, and by what optimizer: all weights, or an adapter beside frozen ones."""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowrank as ol
from lib import bert

# Peak learning rates: AdamW, LoRA and GradNormLoRP from grids on Reuters R8 at rank 8, the others start from them.
LEARNING_RATES = {
    "adamw": 3e-4,
    "lora": 3e-3,
    "dora": 3e-3,
    "gradnormlorp_adapter": 3e-3,
    "gradnormlorp": 3e-3,
    "galore": 3e-3,
    "fira": 3e-3,
    "natural_galore": 3e-3,
    "adarankgrad": 3e-3,
}
# The less of a gradient is projected on, the larger its steps must be.
SCALES = {"gradnormlorp": 8.0, "gradnormlorp_adapter": 1.5}
ADAPTERS = ("lora", "dora", "gradnormlorp_adapter")


def parse_method(text: str, rates: Sequence[float] | None) -> tuple[str, list[float]]:
    """`lora=1e-3,3e-3` names its rates; `lora` takes those of `--lr`, or its default."""
    name, _, own = text.partition("=")
    if name not in LEARNING_RATES:
        raise SystemExit(f"--method {name}: unknown. There is {', '.join(LEARNING_RATES)}.")
    try:
        return name, [float(r) for r in own.split(",")] if own else list(
            rates or [LEARNING_RATES[name]]
        )
    except ValueError:
        raise SystemExit(f"--method {text}: write NAME or NAME=RATE,RATE,…") from None


def lora(weights: nnx.State, adapter: dict[str, Any], scale: float) -> nnx.State:
    """W + s I J for every matrix that has factors."""

    def add(path: tuple[Any, ...], W: jax.Array) -> jax.Array:
        factors = adapter.get(bert.leaf_name(path))
        return W + scale * factors["I"] @ factors["J"] if factors else W

    return jax.tree_util.tree_map_with_path(add, weights)


def trainable(
    method: str, encoder: nnx.State, classes: int, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """What the optimizer sees: the head, and all weights or an adapter for them."""
    width = encoder["embeddings"]["norm"]["scale"].shape[0]
    kernel = 0.02 * jax.random.normal(jax.random.key(seed), (width, classes))
    head = {"kernel": kernel, "bias": jnp.zeros(classes)}
    if method not in ADAPTERS:
        return {"encoder": jax.tree.map(jnp.copy, encoder), "head": head}
    adapter = ol.adapters.init(encoder, args.rank, seed=seed)
    if method == "lora":
        adapter = {path: {name: x[name] for name in "IJ"} for path, x in adapter.items()}
    return {"encoder": adapter, "head": head}


def merged(method: str, frozen: nnx.State | None, part: Any, args: argparse.Namespace) -> nnx.State:
    """The encoder's weights that the trained part stands for."""
    if method == "lora":
        return lora(frozen, part, args.adapter_scale)
    if method in ADAPTERS:
        options = {"scale": args.adapter_scale, "detach_norm": args.detach_norm}
        return ol.adapters.merge(frozen, part, **options)
    return part


def make_optimizer(
    method: str, lr: Any, steps: int, args: argparse.Namespace
) -> optax.GradientTransformation:
    """The method on the encoder, Adam on the head; every rate rises for a tenth of the steps, then falls to 0.

    `lr` may be traced: one program serves all learning rates.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    at = lambda peak: lambda count: peak * shape(count)
    adam, bits, bases = optax.scale_by_adam(), None, {}
    if args.state_bits:
        # moments of r × n are small: without `min_size` they would stay as they are
        bits = {"bits": args.state_bits, "min_size": 256}
        adam = ol.quantize_state(adam, **bits)
        bases = {"basis_store": ol.InDtype(jnp.bfloat16)}
    gap, scale = args.update_proj_gap, args.scale
    if scale is None:
        scale = SCALES.get(method, 1.0)
    match method:
        case "adamw" | "lora" | "dora":
            decay = optax.add_decayed_weights(1e-4 if method == "adamw" else 0.0)
            encoder = optax.chain(adam, decay, optax.scale_by_learning_rate(at(lr)))
        case "gradnormlorp_adapter":
            # On the short side of a factor, whose directions last: a basis of the long side, which has as few
            # columns, is that of a single noisy gradient, and costs accuracy.
            rank, refresh = args.adapter_rank or -(-3 * args.rank // 4), ol.every(gap)
            projected = ol.low_rank(
                adam, rank=rank, fit=ol.svd(), refresh=refresh, scale=scale, **bases
            )
            encoder = ol.assemble(projected, at(lr), rank=rank, inner=adam)
        case alias:
            dense = optax.chain(adam, optax.scale_by_learning_rate(at(args.dense_lr)))
            options = {"rank": args.rank, "update_proj_gap": gap, "scale": scale}
            options |= {"dense": dense, "state_bits": bits}
            encoder = getattr(ol, alias)(at(lr), **options)
    parts = {"encoder": encoder, "head": optax.adam(at(args.head_lr))}
    return optax.partition(parts, {"encoder": "encoder", "head": "head"})
