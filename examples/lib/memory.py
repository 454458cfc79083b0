"""What a run would need, before it is begun: planned from shapes, or said by a compiler."""

import argparse
import time
from typing import Any

import jax
import optax

import optax_lowrank
from lib.devices import Places
from lib.llama import LlamaConfig, abstract_llama
from lib.optimizers import make_optimizer
from lib.steps import TrainState, peak_bytes
from lib.training import compile_step, make_step


def plan(args: argparse.Namespace, config: LlamaConfig) -> optax_lowrank.Plan:
    """What this optimizer, and AdamW beside it, need at most of the budget, all gradients or layer by layer."""

    def method(**options: Any) -> optax.GradientTransformation:
        return make_optimizer(argparse.Namespace(**(vars(args) | options)))

    plain = {"optimizer": "adamw", "option": [], "accumulate": 1}
    methods = {"adamw": lambda state_bits: method(state_bits=state_bits, **plain)}
    match args.optimizer:
        case "adamw":
            pass
        case "muon":
            methods["muon"] = lambda state_bits: method(state_bits=state_bits)
        case "contrib-galore":
            methods["contrib-galore"] = lambda rank: method(rank=rank)
        case alias:
            methods[alias] = lambda rank, state_bits: method(rank=rank, state_bits=state_bits)
    return optax_lowrank.plan(
        abstract_llama(config)[1],
        args.budget,
        methods=methods,
        ranks=(args.rank,),
        bits=(args.state_bits,) if args.state_bits else (None, 8),
    )


def compiled_peak(args: argparse.Namespace, config: LlamaConfig) -> int | None:
    """Peak bytes of the training step by the compiler of `--target`, printed; None without its packages."""
    from lib import targets

    step = make_step(args, config)
    try:
        places = Places(*[targets.placement(args.target)] * 4)
    except targets.Missing as missing:
        print(missing)
        return None
    start = time.perf_counter()
    state = TrainState(step.shapes, jax.eval_shape(step.init, step.shapes))
    compiled = compile_step(args, step, state, places)
    peak = peak_bytes(compiled)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    way = "layer-wise" if args.layerwise else "whole gradient"
    print(
        f"{args.target}, {args.dtype}, {args.batch_size // args.accumulate} x {args.seq_len} tokens, {way}: peak "
        f"{peak / 2**30:.2f} GiB, temporaries {temporaries / 2**30:.2f} GiB; compiled, not run, in "
        f"{time.perf_counter() - start:.0f} s"
    )
    return peak
