"""Pretrain a small Llama on real text with any optimizer of `optax_lowrank`, or one to compare it with.

    python examples/pretrain_llama.py                         # nano, fira, the shipped book: minutes
    python examples/pretrain_llama.py --resume                # the same, continued after Ctrl-C
    python examples/pretrain_llama.py --resume --steps 800    # and made longer; --overwrite begins anew
    python examples/pretrain_llama.py --optimizer adamw
    python examples/pretrain_llama.py --optimizer adarankgrad --compact-every 50
    python examples/pretrain_llama.py --size 60m --corpus newsgroups --tokenizer bpe --vocab-size 32000
    python examples/pretrain_llama.py --init smollm2 --corpus FILE --seq-len 256 --batch-size 4
    python examples/pretrain_llama.py --size 1b --tokenizer bpe --vocab-size 32000 --memory
    python examples/pretrain_llama.py --size 7b --layerwise --state-bits 8     # within 24 GB
    python examples/pretrain_llama.py --size 7b --layerwise --state-bits 8 --compile-only --target rtx4090
    python examples/pretrain_llama.py --size 1b --mesh data=4,model=2          # eight devices
    python examples/pretrain_llama.py --size 1b --distributed                  # a TPU pod, or srun under Slurm

In `--out` it leaves `metrics.jsonl` (one JSON object a line), `checkpoints/`, `result.json`, and with each checkpoint
`loss.png`, `energy.png` and, where ranks change, `ranks.png`.  The matrices of the layers have the optimizer's learning
rate `--lr`; embedding, head and norms have AdamW at `--dense-lr`, because a rate that `--scale` reduces in the subspace
is too hot for them.  `--resume` with more `--steps` goes on with the learning rate of the longer run, which is higher
there than where a finished one ended.

`--layerwise` updates each layer inside the backward pass, so that the gradients of one layer live at a time:
the same steps, except that `--clip` clips each layer, and what is around the layers, by its own norm.  All
optimizers but contrib-galore do this, and all options but two: `--compact-every`, as all layers of a stack have
the same shapes, and `--accumulate` with the baselines, whose sums would be gradients of all layers.

`--mesh` trains on several devices, `--distributed` or `--coordinator` in several processes, which share `--out`;
`lib/devices.py` says what lies where.  A checkpoint of any mesh and number of processes is continued by any other.
"""

import os

# Threaded LAPACK beside any busy process is slower by orders of magnitude; read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys

if "--compile-only" in sys.argv:
    from lib import targets  # noqa: F401  sets what compilers without a device want to know before JAX begins

import argparse
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from lib import devices, memory, options, plots, runs, text, training
from lib.llama import LlamaConfig, abstract_llama
from lib.optimizers import make_optimizer
from lib.progress import Progress, compiling, say

import optax_lowrank


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the options say; returns what `result.json` holds."""
    args = options.parse(argv, about=(__doc__ or "").split("\n\n")[0])
    devices.connect(args)
    config = options.model_config(args)
    report = optax_lowrank.memory_report(make_optimizer(args), abstract_llama(config)[1])
    say(f"Llama {args.size}, {args.optimizer}, learning rate {args.lr:g}\n\n{report}\n")
    result = {
        "settings": options.settings(args),
        "parameter_bytes": report.parameters,
        "state_bytes": report.state,
        "adamw_bytes": report.adamw,
        "finished": False,
    }
    if args.memory:
        say(str(memory.plan(args, config)))
        return result
    if args.compile_only:
        result["peak_bytes"] = memory.compiled_peak(args, config)
        return result

    runs.check_out(args)
    mesh = devices.make_mesh(args.mesh, args.batch_size // args.accumulate)
    devices.wait_for_all("checked")  # or one would find the settings that the first one writes
    tokens = training.read_tokens(args, config)
    with devices.first_one_first("begun"):
        runs.begin(args)
    metrics = train(args, config, tokens, mesh)
    step = metrics.records[-1]["step"]
    if step < args.steps:
        say(f"Stopped and saved after step {step}. The same command with --resume continues it.")
    else:
        finish(args, result, metrics)
    return result


def train(
    args: argparse.Namespace,
    config: LlamaConfig,
    tokens: text.Tokens,
    mesh: jax.sharding.Mesh | None,
) -> runs.Metrics:
    """Run from the first step, or the last checkpoint, to `--steps` or Ctrl-C."""
    one_step = training.make_step(args, config)
    places = devices.places(one_step, mesh)
    with (
        runs.checkpoints(args.out / "checkpoints") as manager,
        runs.stop_signal() as stop,
        devices.within(mesh),
    ):
        first = manager.latest_step() or 0
        begin = lambda: training.first_state(args, config, one_step, places)
        state = runs.restore(manager, one_step, places) if first else begin()
        metrics = runs.Metrics(args.out / "metrics.jsonl", first)
        with compiling():
            train_step = training.compile_step(args, one_step, state, places)
            evaluate = training.evaluation(args, one_step, state, tokens, metrics, places)
        if not metrics.records:
            evaluate(0, state)
        progress = Progress(metrics, args, first)
        for step in range(first + 1, args.steps + 1):
            loss = 0.0
            for batch in training.micro_batches(args, tokens, step, places):
                state, part = train_step(state, batch, np.int32(step))
                loss += part / args.accumulate
            progress.losses.append(loss)
            due = training.due_after(args, step, bool(stop))
            if not due and not progress.overdue():
                continue
            progress.look(step, training.state_bytes(state.opt_state))
            if "eval" in due:
                evaluate(step, state)
            if "compact" in due:
                smaller = training.compacted(one_step, state, places)
                if smaller is not state:
                    state = smaller
                    with compiling():
                        train_step = training.compile_step(args, one_step, state, places)
            if "save" in due:
                manager.save(step, args=ocp.args.StandardSave(state))
                draw(args, metrics)
            if "stop" in due:
                break
            progress.go_on()
        progress.bar.close()
    return metrics


def draw(args: argparse.Namespace, metrics: runs.Metrics) -> None:
    if devices.is_first():
        plots.draw(metrics, f"Llama {args.size}, {args.optimizer}", args.out)


def finish(args: argparse.Namespace, result: dict[str, Any], metrics: runs.Metrics) -> None:
    """Fill in the result of a finished run, and write it."""
    mean = lambda key: float(np.mean(metrics.series(key)[1]))
    result |= {
        "finished": True,
        "valid_loss": metrics.series("valid_loss")[1][-1],
        "mean_state_bytes": mean("state_bytes"),
        "step_ms": mean("step_ms"),
        "wall_s": metrics.records[-1]["elapsed_s"],
    }
    if devices.is_first():
        (args.out / "result.json").write_text(json.dumps(result, indent=2))
    share = result["mean_state_bytes"] / result["adamw_bytes"]
    say(
        f"{args.optimizer}: validation loss {result['valid_loss']:.4f}, state {result['mean_state_bytes']:,.0f} bytes "
        f"on average ({share:.0%} of AdamW), {result['wall_s']:.0f} s; see {args.out / 'loss.png'}"
    )


if __name__ == "__main__":
    main()
