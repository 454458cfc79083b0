"""Optimizer memory of LLaMA-7B, counted from shapes: GradNormLoRP's 8-bit state against AdamW in bfloat16.

    python examples/memory_7b.py                  # rank 1024, two-sided
    python examples/memory_7b.py --rank 512 912

Nothing is allocated. AdamW keeps two bfloat16 numbers a parameter. "Everything" counts all arrays of the state,
"linear layers" those of the projected matrices; each is divided by AdamW's for the same parameters, and the linear
layers also by AdamW's for all of them, as tables that leave the embeddings out of one side only do.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import optax_lowrank as ol

LAYERS, HIDDEN, FFN, VOCAB = 32, 4096, 11008, 32000
STATES = {
    "32-bit moments and bases": {},
    "8-bit moments, bfloat16 bases": {"state_bits": 8},
    "8-bit moments and bases": {"state_bits": 8, "basis_bits": 8},
    "8-bit moments, 4-bit bases": {"state_bits": 8, "basis_bits": 4},
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


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--rank", type=int, nargs="+", default=[1024])
    args = p.parse_args(argv)
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
