"""Memory of LLaMA-7B, counted from shapes: which optimizer fits 24 GB, beside what the papers print.

    python examples/memory_7b.py                  # rank 1024
    python examples/memory_7b.py --rank 512 912 --budget 16GB

Nothing is allocated. Weights are bfloat16, and so are AdamW's two moments. "Sum" is that of `optax_lowrank.plan`:
weights, state, gradients, and an estimate of the temporaries; no activations. The savings of GradNormLoRP are counted
in three ways: "everything" counts all arrays of the state, "linear layers" those of the projected matrices; each is
divided by AdamW's for the same parameters, and the linear layers also by AdamW's for all of them, as tables that leave
the embeddings out of one side only do.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_lowrank as ol

LAYERS, HIDDEN, FFN, VOCAB = 32, 4096, 11008, 32000
STATES = {
    "32-bit moments and bases": {},
    "8-bit moments, bfloat16 bases": {"state_bits": 8},
    "8-bit moments and bases": {"state_bits": 8, "basis_bits": 8},
    "8-bit moments, 4-bit bases": {"state_bits": 8, "basis_bits": 4},
}


class Printed(NamedTuple):
    """A row of a paper, and how to count it."""

    paper: str
    text: str
    counts: str  # "sum", or "kept": weights and state
    method: str
    rank: int | None = None
    bits: int | None = None
    layerwise: bool = False


PAPERS = (
    Printed("GaLore, introduction", "58 GB, 2 of them activations", "sum", "adamw"),
    Printed("GaLore, Table 3", "26 G", "kept", "adamw", bits=8),
    Printed("GaLore, Table 3", "18 G", "kept", "galore", 1024, 8),
    Printed("GaLore, on one card", "22.0 GB", "sum", "galore", 1024, 8, True),
    Printed("Fira, Table 4 (fine-tuning)", "14.44 G", "kept", "fira", 32, 8),
)


def adamw(state_bits: int | None) -> optax.GradientTransformation:
    if state_bits is None:
        return optax.adamw(0.01)
    return optax.chain(ol.quantize_state(optax.scale_by_adam()), optax.scale_by_learning_rate(0.01))


METHODS = {
    "adamw": adamw,
    "galore": lambda rank, state_bits: ol.galore(0.01, rank=rank, state_bits=state_bits),
    "fira": lambda rank, state_bits: ol.fira(0.01, rank=rank, state_bits=state_bits),
    "gradnormlorp": lambda rank, state_bits: ol.gradnormlorp(
        0.01, rank=rank, state_bits=state_bits, basis_bits=state_bits
    ),
}


def llama_7b() -> dict:
    """Shapes of the parameters; the layers are stacked."""
    kernel = lambda n_in, n_out: {
        "kernel": jax.ShapeDtypeStruct((LAYERS, n_in, n_out), jnp.bfloat16)
    }
    dense = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    attention = {name: kernel(HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {name: kernel(HIDDEN, FFN) for name in ("gate_proj", "up_proj")}
    return {
        "embed": {"embedding": dense(VOCAB, HIDDEN)},
        "layers": {
            **attention,
            **mlp,
            "down_proj": kernel(FFN, HIDDEN),
            "norm1": {"scale": dense(LAYERS, HIDDEN)},
            "norm2": {"scale": dense(LAYERS, HIDDEN)},
        },
        "norm": {"scale": dense(HIDDEN)},
        "lm_head": {"kernel": dense(HIDDEN, VOCAB)},
    }


def savings(rank: int, **options) -> dict[str, float]:
    """Bytes of the state, and the share of bfloat16 AdamW's that it saves in each accounting."""
    axes = {r"layers/.*/kernel": ol.MatrixAxes(1, 2)}
    tx = ol.gradnormlorp(0.01, rank=rank, weight_dimension_numbers=axes, **options)
    report = ol.memory_report(tx, llama_7b())
    linear = [group for group in report.groups.values() if group.projected]
    state, adamw = sum(g.arrays for g in linear), sum(g.adamw for g in linear)
    return {
        "bytes": report.state,
        "everything": 1 - report.state / report.adamw,
        "linear layers": 1 - state / adamw,
        "linear layers, of all of AdamW": 1 - state / report.adamw,
    }


def largest_rank(saved: float, accounting: str, **options) -> int:
    """The largest multiple of 8 at which the state saves so much."""
    ranks = range(8, 2048, 8)
    enough = lambda rank: savings(rank, **options)[accounting] >= saved
    low, high = 0, len(ranks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(ranks[middle]) else (low, middle)
    return ranks[low]


def papers_table() -> str:
    """What papers print for LLaMA-7B beside what our optimizers need, in GB of 10⁹ bytes."""
    lines = ["| | counted | GB | paper | prints |", "|---|---|---|---|---|"]
    for row in PAPERS:
        (ours,) = ol.plan(
            llama_7b(),
            0,
            methods={row.method: METHODS[row.method]},
            ranks=(row.rank,),
            bits=(row.bits,),
            layerwise=(row.layerwise,),
        ).rows
        what = {"sum": "sum", "kept": "weights and state"}[row.counts]
        size = ours.total if row.counts == "sum" else ours.parameters + ours.state
        words = [
            row.method,
            row.rank and f"rank {row.rank}",
            row.bits and f"{row.bits} bits",
            row.layerwise and "layer-wise",
        ]
        name = ", ".join(word for word in words if word)
        lines.append(f"| {name} | {what} | {size / 1e9:.1f} | {row.paper} | {row.text} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--rank", type=int, nargs="+", default=[1024])
    p.add_argument("--budget", default="24GB", help="memory of the device")
    args = p.parse_args(argv)
    if max(args.rank) >= 4096:
        p.error(
            f"--rank must be below 4096, the shorter side of every matrix, got {max(args.rank)}"
        )
    print(ol.plan(llama_7b(), args.budget, methods=METHODS, ranks=args.rank), "\n")
    print(papers_table(), "\n")
    print("| rank | state | GB | everything | linear layers | linear layers, of all of AdamW |")
    print("|---|---|---|---|---|---|")
    for rank in args.rank:
        for name, options in STATES.items():
            size, *shares = savings(rank, **options).values()
            cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
            print(f"| {rank} | {name} | {size / 1e9:.2f} | {cells} |")
    print("\nlargest ranks that save 89.5 %, with 8-bit moments:")
    for bits in (8, 4):
        options = {"state_bits": 8, "basis_bits": bits}
        for accounting in list(savings(8))[1:]:
            rank = largest_rank(0.895, accounting, **options)
            print(f"  {bits}-bit bases, {accounting}: rank {rank}")


if __name__ == "__main__":
    main()
