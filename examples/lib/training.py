"""The training program of a run and what surrounds its steps: first state, batches, evaluation, compaction."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowrank
from lib import devices, smollm2, text
from lib.devices import Places
from lib.llama import LlamaConfig
from lib.optimizers import make_optimizer
from lib.progress import say
from lib.runs import Metrics
from lib.steps import LayerWise, TrainState, Whole, apply_nearest

HEADROOM = 4  # columns that compaction keeps beyond those in use, since ranks also rise
LOG_EVERY = 10  # steps between two looks at the device, because each look waits for it


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
    state: TrainState,
    tokens: text.Tokens,
    metrics: Metrics,
    places: Places | None,
) -> Callable[[int, TrainState], None]:
    """What adds validation loss and bases to the metrics, compiled."""
    valid = tokens.valid_batches(args.eval_batches, args.batch_size, args.seq_len)
    batches = [devices.put(batch, places.batch) for batch in valid] if places else valid
    place = {"out_shardings": places.scalar} if places else {}
    valid_loss = jax.jit(one_step.loss, **place).lower(state.params, batches[0]).compile()

    def evaluate(step: int, state: TrainState) -> None:
        loss = float(np.mean([valid_loss(state.params, batch) for batch in batches]))
        metrics.add(step=step, valid_loss=loss)
        if bases := jax.device_get(one_step.diagnostics(state.opt_state)):
            metrics.add(step=step, bases={path: as_lists(d) for path, d in bases.items()})
        say(f"step {step:6d}   validation loss {loss:.4f}")

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
