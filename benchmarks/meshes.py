"""Eight devices against one: the same updates, the state where it was put, one trace.

Eight CPU devices want XLA_FLAGS before JAX is imported, so each optimizer has a process of its own
(`python -m benchmarks.meshes JOB`).
"""

import collections
import functools
import itertools
import json
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_lowrank as ol
from benchmarks.processes import eight_devices, in_child
from benchmarks.tables import Options, Table

STEPS, GAP, RANK = 30, 7, 4
# Of the gradients. Fira takes ‖E_j‖² as ‖G_j‖² − ‖R_j‖², which cancels where a basis holds nearly all of a column.
NOISE = 0.02
MESHES = ((8, 1), (4, 2), (1, 8))
KINDS = (AxisType.Auto, AxisType.Explicit)
HEADER = (
    "optimizer",
    "mesh",
    "axes",
    "largest difference, layers apart",
    "stacked",
    "dense",
    "median",
    "arrays of the state that moved",
    "traces",
)
# Leaves of one shape meet in one refit program, whatever their sharding and whether they are stacked.
LEAVES = {
    "layers_0/q/kernel": ((32, 32), P("data", "model")),
    "layers_0/o/kernel": ((32, 32), P("model", "data")),
    "layers_0/up/kernel": ((32, 48), P("data", "model")),
    "layers_0/down/kernel": ((48, 32), P("model", "data")),
    "layers_1/q/kernel": ((32, 32), P("data", "model")),
    "layers/o/kernel": ((2, 32, 32), P(None, "model", "data")),
    "layers/up/kernel": ((2, 32, 48), P(None, "data", "model")),
    "layers/up/bias": ((2, 48), P(None, "model")),
}
QUICK = ("layers_0/q/kernel", "layers/o/kernel", "layers/up/bias")


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Every alias, with float32 and with 8-bit state."""
    adaptive = {"min_rank": 1, "rank_step": 1}
    made = {
        "galore": ol.galore,
        "fira": ol.fira,
        "natural_galore": ol.natural_galore,
        "adarankgrad": functools.partial(ol.adarankgrad, **adaptive),
        "gradnormlorp": ol.gradnormlorp,
        "apollo": ol.apollo,
        "low_rank_muon": ol.low_rank_muon,
    }
    options = {"rank": RANK, "update_proj_gap": GAP}
    codes = {"bits": 8, "min_size": 16}
    found = {name: make(0.01, **options) for name, make in made.items()}
    return found | {
        f"{name}, 8 bits": make(0.01, state_bits=codes, **options) for name, make in made.items()
    }


def meshes(options: Options) -> Table:
    """Updates on eight devices against those on one, 30 steps with five refits, relative to a leaf's largest entry."""
    rows = []
    for name in ["galore"] if options.quick else optimizers():
        job = {"optimizer": name, "quick": options.quick}
        found = in_child("benchmarks.meshes", job, eight_devices())
        if "error" in found:
            rows.append((name, found["error"].replace("|", "/"), *("–",) * (len(HEADER) - 2)))
            continue
        rows += [(name, *row) for row in found["rows"]]
        print(f"{name}: {found['rows']}", flush=True)
    note = (
        f"Eight CPU devices. Leaves of {', '.join(sorted({_text(s) for s, _ in LEAVES.values()}))} along both axes of "
        f"the mesh; gradients of rank {RANK} and noise, rank {RANK}, a refit every {GAP} steps. The state is placed by "
        "`state_shardings`; with automatic axes the step has them as `out_shardings`, with explicit ones nothing says "
        "where it goes. Median: of all leaves and steps. In 8 bits moments are codes, bases bfloat16, and a number "
        "between two of them may become either: a code of ν that is off by one shows in one column of the update."
    )
    return Table(HEADER, rows, (note,))


def _text(shape):
    return "×".join(map(str, shape))


def draw(leaves, seed: int) -> dict[str, np.ndarray]:
    """Leaves with singular values 4, 3, 2, 1 and a gap after them, so that two programs mean the same basis."""
    random = np.random.default_rng(seed)

    def leaf(shape):
        noise = NOISE * random.standard_normal(shape)
        if shape[-2] < 2 * RANK:  # a bias
            return noise
        side = lambda size: np.linalg.qr(random.standard_normal((*shape[:-2], size, RANK)))[0]
        left, right = side(shape[-2]), side(shape[-1])
        return (left * np.arange(RANK, 0, -1)) @ right.swapaxes(-1, -2) + noise

    return {name: leaf(shape).astype(np.float32) for name, (shape, _) in leaves.items()}


def run(tx, leaves, steps, shardings=None, places=None, explicit=False):
    """Updates of each step, arrays of the state that were not at their place after one, traces."""
    traces, moved, history = [], set(), []
    put = lambda tree: tree if shardings is None else jax.device_put(tree, shardings)

    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    told = None if shardings is None or explicit else (shardings, places, shardings)
    step = jax.jit(step, out_shardings=told, donate_argnums=1)
    params = put(draw(leaves, STEPS))
    state = jax.jit(tx.init, out_shardings=places)(params)
    for count in range(steps):
        params, state, updates = step(params, state, put(draw(leaves, count)))
        history.append(jax.tree.map(np.asarray, updates))
        if places is not None:
            for (path, x), place in zip(
                jax.tree.leaves_with_path(state), jax.tree.leaves(places), strict=True
            ):
                if not x.sharding.is_equivalent_to(place, x.ndim):
                    moved.add(jax.tree_util.keystr(path))
    return history, moved, len(traces)


def measure(optimizer: str, quick: bool) -> list[tuple[str, ...]]:
    """A row for each mesh."""
    tx, steps = optimizers()[optimizer], 2 if quick else STEPS
    leaves = {name: LEAVES[name] for name in QUICK} if quick else LEAVES
    want, *_ = run(tx, leaves, steps)
    rows = []
    for shape in MESHES[1:2] if quick else MESHES:
        for kind in KINDS[:1] if quick else KINDS:
            mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
            with jax.set_mesh(mesh):
                shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}
                shapes = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), draw(leaves, 0)
                )
                places = ol.state_shardings(tx, shapes, shardings)
                explicit = kind is AxisType.Explicit
                got, moved, traces = run(tx, leaves, steps, shardings, places, explicit)
            found = collections.defaultdict(list)
            for one, other in zip(want, got, strict=True):
                for name, u in one.items():
                    error = np.max(np.abs(u - other[name])) / np.max(np.abs(u))
                    found[_group(name)].append(float(error))
            largest = [f"{max(found[group]):.1e}" for group in ("apart", "stacked", "dense")]
            median = f"{np.median(list(itertools.chain(*found.values()))):.1e}"
            cells = (_text(shape), kind.name, *largest, median, str(len(moved)), str(traces))
            rows.append(cells)
            for path in sorted(moved):
                print("moved:", path, file=sys.stderr)
    return rows


def _group(name):
    if name.endswith("bias"):
        return "dense"
    return "stacked" if name.startswith("layers/") else "apart"


if __name__ == "__main__":
    print("\n" + json.dumps({"rows": measure(**json.loads(sys.argv[1]))}))
