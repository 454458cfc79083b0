"""The optimizer of a run, by its name and options: one on the matrices of the layers, AdamW on everything else."""

import argparse
import ast
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import optax_lowrank

BASELINES = ("adafactor", "adamw", "contrib-galore", "muon", "scale")
# Peak learning rates, from grids of `nano` on the shipped book (`compare.py` makes them).
LEARNING_RATES = {"adafactor": 0.05, "adamw": 3e-3, "fira": 1e-2, "muon": 2e-2, "scale": 1e-2}
LOW_RANK_LEARNING_RATE = 2e-2  # GaLore's best; every other one starts from it
DENSE_LEARNING_RATE = 3e-3
FITS = ("randomized_svd", "svd", "subspace_iteration", "gaussian", "seeded", "dct")


def aliases() -> list[str]:
    """The optimizers that the library exports: what takes a learning rate first, and a rank."""

    def is_alias(function: Any) -> bool:
        names = list(inspect.signature(function).parameters)
        return names[:1] == ["learning_rate"] and "rank" in names

    return [n for n, f in inspect.getmembers(optax_lowrank, inspect.isfunction) if is_alias(f)]


def default_lr(optimizer: str) -> float:
    return LEARNING_RATES.get(optimizer, LOW_RANK_LEARNING_RATE)


def schedule(args: argparse.Namespace, peak: float) -> optax.Schedule:
    warmup = round(args.warmup * args.steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, args.steps, end_value=peak / 10)


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Clipping, then the optimizer on the matrices of the layers and AdamW on everything else."""
    decay = {
        "weight_decay": args.weight_decay,
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    }
    subspace = {"rank": args.rank, "scale": args.scale}
    if args.update_proj_gap:
        subspace["update_proj_gap"] = args.update_proj_gap
    dense = in_float32(adamw(schedule(args, args.dense_lr), args.state_bits, decay))
    make = baseline if args.optimizer in BASELINES else of_the_library
    tx = make(args, subspace, decay, dense)
    if args.clip:
        tx = optax.chain(optax.clip_by_global_norm(args.clip), tx)
    if args.optimizer in BASELINES and args.accumulate > 1:
        tx = optax.MultiSteps(tx, args.accumulate).gradient_transformation()
    return tx


def of_the_library(
    args: argparse.Namespace,
    subspace: dict[str, Any],
    decay: dict[str, Any],
    dense: optax.GradientTransformation,
) -> optax.GradientTransformation:
    make = getattr(optax_lowrank, args.optimizer)
    own = {
        "dense": dense,
        "fit": getattr(optax_lowrank, args.fit)() if args.fit else None,
        "state_bits": args.state_bits,
        "accumulate": args.accumulate,
        "seed": args.seed,
    }
    takes = inspect.signature(make).parameters
    arguments = {k: v for k, v in (subspace | decay | own).items() if k in takes}
    return make(schedule(args, args.lr), **(arguments | own_options(args)))


def baseline(
    args: argparse.Namespace,
    subspace: dict[str, Any],
    decay: dict[str, Any],
    dense: optax.GradientTransformation,
) -> optax.GradientTransformation:
    lr, options = schedule(args, args.lr), own_options(args)
    match args.optimizer:
        case "adafactor":
            # its own `weight_decay_rate` is no multiple of the learning rate
            decayed = optax.add_decayed_weights(-args.weight_decay), optax.scale_by_schedule(lr)
            return matrices(optax.chain(optax.adafactor(None, **options), *decayed), dense)
        case "adamw":
            return adamw(lr, args.state_bits, decay, **options)
        case "contrib-galore":
            return matrices(optax.contrib.galore(lr, **subspace, **decay, **options), dense)
        case "muon":
            bits = options.pop("state_bits", args.state_bits)
            tx = optax.contrib.muon(lr, weight_decay=args.weight_decay, **options)
            return matrices(in_codes(tx, bits) if bits else tx, dense)
        case "scale":
            # arXiv:2506.16659 of the matrices; its momentum of the head is Adam's here, as for all others
            decayed = optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(lr)
            return matrices(optax.chain(unit_columns(), *decayed), dense)


def unit_columns() -> optax.GradientTransformation:
    """Each output's column of the gradient by its norm, without any state."""

    def unit(g: jax.Array, _: Any) -> jax.Array:
        wide = g.astype(jnp.float32)
        norm = optax.safe_norm(wide, 1e-30, axis=-2, keepdims=True)
        return (wide / norm).astype(g.dtype)

    return optax.stateless_with_tree_map(unit)


def own_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `--option NAME=VALUE` gives."""
    return {k: literal(v) for k, v in (option.split("=", 1) for option in args.option)}


def adamw(
    rate: optax.Schedule, bits: int | None, decay: dict[str, Any], **options: Any
) -> optax.GradientTransformation:
    if bits is None:
        return optax.adamw(rate, **decay, **options)
    adam = optax_lowrank.quantize_state(optax.scale_by_adam(**options), bits)
    rest = optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(rate)
    return optax.chain(adam, *rest)


def in_codes(tx: optax.GradientTransformation, bits: Any) -> optax.GradientTransformation:
    """With the state in these bits, or by these arguments of `quantize_state`, as the library's optimizers have it."""
    return optax_lowrank.quantize_state(tx, **(bits if isinstance(bits, dict) else {"bits": bits}))


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with float32 moments beside bfloat16 weights, in which a second moment could not decay."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide_updates, state = tx.update(wide(updates), state, params)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), wide_updates, updates), state

    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update)


def matrices(
    matrix: optax.GradientTransformation, dense: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The split that the library makes by itself: only the kernels inside the layers are matrices."""

    def label(path: tuple[Any, ...], _: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "matrix" if is_matrix(name) else "dense"

    parts = {"matrix": matrix, "dense": dense}
    return optax.partition(parts, functools.partial(jax.tree_util.tree_map_with_path, label))


def is_matrix(path: str) -> bool:
    return "kernel" in path and "lm_head" not in path


def literal(value: str) -> Any:
    """`8`, `1e-3`, `True` and `None` as Python reads them; any other word is a string."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
