"""A classifier of texts: its data, its compiled training step, and what it finds."""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm.auto import tqdm

from lib import labelled_text
from lib.finetuning import make_optimizer, merged


class Data(NamedTuple):
    """Token ids (texts, time) and labels (texts,) of three sets of texts."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: list[str]


def load(args: argparse.Namespace, tokenizer: Any) -> Data:
    """A fixed sample of the training texts, 500 others to choose a learning rate by, and the test texts."""
    train, test = labelled_text.read(args.data)
    order = np.random.default_rng(0).permutation(len(train.texts))
    valid, rest = train.take(order[:500]), train.take(order[500:])
    sizes = (args.train_size or None, None, args.test_size or None)
    parts = [
        (labelled_text.tokenize(tokenizer, x.texts[:size], args.max_length), x.labels[:size])
        for x, size in zip((rest, valid, test), sizes, strict=True)
    ]
    return Data(*parts, train.classes)


def logits_of(graph: nnx.GraphDef, encoder: nnx.State, head: Any, tokens: jax.Array) -> jax.Array:
    hidden = nnx.merge(graph, encoder)(tokens)
    there = (tokens != 0)[..., None]
    mean = jnp.sum(hidden * there, axis=1) / jnp.sum(there, axis=1)
    return mean @ head["kernel"] + head["bias"][None]


class Programs(NamedTuple):
    """One method, compiled once for all its learning rates and seeds."""

    init: Any
    step: Any
    merge: Any


def compile_method(
    method: str,
    graph: nnx.GraphDef,
    params: Any,
    frozen: nnx.State | None,
    data: Data,
    steps: int,
    args: argparse.Namespace,
) -> Programs:
    """The step is compiled here, so that the runs' times are without it."""

    def loss_fn(params, frozen, tokens, labels):
        encoder = merged(method, frozen, params["encoder"], args)
        logits = logits_of(graph, encoder, params["head"], tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, frozen, tokens, labels, lr):
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, tokens, labels)
        tx = make_optimizer(method, lr, steps, args)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    init = make_optimizer(method, 0.0, steps, args).init
    batch = [array[: args.batch_size] for array in data.train]
    shapes = (params, jax.eval_shape(init, params), frozen, *batch, jnp.float32(0))
    return Programs(
        jax.jit(init),
        jax.jit(step, donate_argnums=(0, 1)).lower(*shapes).compile(),
        jax.jit(lambda frozen, part: merged(method, frozen, part, args)),
    )


def train(
    programs: Programs,
    params: Any,
    frozen: nnx.State | None,
    data: Data,
    lr: float,
    seed: int,
    args: argparse.Namespace,
    label: str,
) -> tuple[Any, list[float]]:
    """Trained parameters, and the loss of every step."""
    tokens, labels = data.train
    state, losses = programs.init(params), []
    random = np.random.default_rng(seed)
    batches = len(tokens) // args.batch_size
    bar = tqdm(total=args.epochs * batches, desc=label, disable=None)  # None: only on a terminal
    for _ in range(args.epochs):
        for rows in random.permutation(len(tokens))[: batches * args.batch_size].reshape(
            batches, -1
        ):
            params, state, loss = programs.step(
                params, state, frozen, tokens[rows], labels[rows], jnp.float32(lr)
            )
            losses.append(loss)
            bar.update()
            if len(losses) % 10 == 0:
                bar.set_postfix_str(f"loss {float(loss):.3f}")
    bar.close()
    return params, [float(loss) for loss in jax.device_get(losses)]


def predict(
    logits: Any, encoder: nnx.State, head: Any, tokens: np.ndarray, batch: int
) -> np.ndarray:
    """Classes of the texts; the last batch is filled up, so that one program serves all."""
    found = []
    for first in range(0, len(tokens), batch):
        rows = np.minimum(np.arange(first, first + batch), len(tokens) - 1)
        found.append(np.argmax(logits(encoder, head, tokens[rows]), axis=1))
    return np.concatenate(found)[: len(tokens)]
