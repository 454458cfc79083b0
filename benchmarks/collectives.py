"""Every collective of a step and of a refit on a mesh, read from compiled programs.

Each optimizer is compiled in a process of its own (`python -m benchmarks.collectives JOB`): what XLA is told must be
there before JAX is imported.
"""

import dataclasses
import json
import math
import re
import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import optax_lowrank as ol
from benchmarks import targets
from benchmarks.processes import eight_devices, in_child
from benchmarks.tables import Options, Table
from benchmarks.trees import REFITS, step_of

LAYERS, HIDDEN, FFN = 2, 512, 1376
RANK = HIDDEN // 16
TARGETS = {"cpu": 8, "h100": 8, "v5e:4x4": 16}
HEADER = (
    "target",
    "mesh",
    "layers",
    "optimizer",
    "step: collectives",
    "KiB",
    "largest array",
    "of a matrix",
    "refit of a matrix: collectives",
    "KiB",
    "largest array",
    "of a matrix",
)


def collectives(options: Options) -> Table:
    """Collectives of compiled updates, not run: what a device sends or receives of arrays, by the larger of the two."""
    rows, notes = [], [NOTE]
    for target in list(TARGETS)[: 1 if options.quick else None]:
        if target != "cpu" and (sentence := targets.missing(target)):
            notes.append(sentence)
            continue
        environment = eight_devices() if target == "cpu" else targets.ENVIRONMENT
        of_target = []
        for name in ["galore"] if options.quick else _names(target):
            job = {"target": target, "optimizer": name, "quick": options.quick}
            found = in_child("benchmarks.collectives", job, environment, timeout=3600)
            if "error" in found:
                cells = (found["error"].replace("|", "/"), *("–",) * (len(HEADER) - 5))
                found = {"rows": [(target, "all", "all", name, *cells)]}
            of_target += found["rows"]
            print(*("| " + " | ".join(row) + " |" for row in found["rows"]), sep="\n", flush=True)
        rows += sorted(of_target, key=lambda row: row[1:3])
        if target != "cpu":
            notes.append(f"{targets.compilers(target)}.")
    return Table(HEADER, rows, tuple(notes))


NOTE = (
    f"{LAYERS} layers of kernels {HIDDEN}×{FFN} (up) and {FFN}×{HIDDEN} (down) in float32, rank {RANK}; up lies along "
    "(data, model), down along (model, data), the state where `state_shardings` says. Mesh n×1 is FSDP, 1×n tensor "
    "parallelism; *split* is a stack that data divides by its layers, *own* the same in a `shard_map` along them. "
    "Largest: operand or result of any collective, and its numbers by those of one layer's kernel; a vector is what "
    "XLA for GPUs merges of several arrays. Of branches the one that exchanges most counts; a loop of unknown length "
    "counts as one turn. `optax.contrib.galore` refits all four matrices at once, and is left out for GPUs and TPUs, "
    "as are some layouts for TPUs."
)


def _names(target) -> list[str]:
    names = list(targets.optimizers(RANK, stack=False))
    return [name for name in names if target == "cpu" or name != "optax.contrib.galore"]


def layouts(target: str) -> list[tuple[str, tuple[int, int]]]:
    """Layers and mesh of each program."""
    count = TARGETS[target]
    shapes = ((count, 1), (4, count // 4), (1, count))
    stacked = [("stacked", shape) for shape in shapes]
    if target not in ("cpu", *targets.CARDS):
        return [("apart", shapes[1]), *stacked]
    apart = [("apart", shape) for shape in shapes]
    by_layers = LAYERS, count // LAYERS
    return [*apart, *stacked, ("split", by_layers), ("own", by_layers)]


def kernels(layers: str) -> dict[str, tuple[tuple[int, ...], P]]:
    """Shape and place of each leaf."""
    up, down = ((HIDDEN, FFN), ("data", "model")), ((FFN, HIDDEN), ("model", "data"))
    named = {"up/kernel": up, "down/kernel": down}
    if layers == "apart":
        return {
            f"layers_{layer}/{name}": (shape, P(*axes))
            for layer in range(LAYERS)
            for name, (shape, axes) in named.items()
        }
    place = lambda axes: P(None, *axes)
    if layers in ("split", "own"):
        place = lambda axes: P("data", *[None if axis == "data" else axis for axis in axes])
    return {
        f"layers/{name}": ((LAYERS, *shape), place(axes)) for name, (shape, axes) in named.items()
    }


def compiled(tx: optax.GradientTransformation, layers: str, mesh: Mesh) -> str:
    """The optimized program of update and apply, as text."""
    on = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    leaves = kernels(layers)
    along = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=along[name])
        for name, (shape, _) in leaves.items()
    }
    state = jax.eval_shape(tx.init, params)
    places = ol.state_shardings(tx, params, along)
    step = step_of(tx)
    if layers == "own":
        split = lambda x: P("data") if x.ndim else P()
        specs = jax.tree.map(split, (params, state, params))
        axes = {"mesh": mesh, "axis_names": {"data"}}
        step = jax.shard_map(step, in_specs=specs, out_specs=specs[:2], **axes)
        beside = lambda x, place: NamedSharding(mesh, P(*split(x), *place.spec[1:]))
        places = jax.tree.map(beside, state, places)
    state = jax.tree.map(on, state, places)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(along, places))
    return step.lower(params, state, params).compile().as_text()


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of some collectives: how many, bytes of their arrays, numbers and type of the largest array."""

    count: int = 0
    bytes: int = 0
    largest: tuple[int, str] = (0, "–")

    def __add__(self, other):
        largest = max(self.largest, other.largest)
        return Traffic(self.count + other.count, self.bytes + other.bytes, largest)

    def __mul__(self, times):
        return Traffic(self.count * times, self.bytes * times, self.largest)

    def cells(self) -> tuple[str, ...]:
        numbers, text = self.largest
        share = f"{numbers / (HIDDEN * FFN):.1%}" if numbers else "–"
        return str(self.count), f"{self.bytes / 2**10:,.1f}", text, share


_COLLECTIVE = re.compile(
    r"(ragged-all-to-all|all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast)"
    r"(-start)?"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|calls|to_apply)=%?([\w.\-]+)")
_BRANCH = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# XLA for TPUs runs a collective beside other fusions: it stands where it starts, in each of them, and where it ends.
_GOES_ON = re.compile(r"%async-collective-done[\w.\-]* = |calls=%async_collective_fusion")
# The loops over matrices that are due, and over states that turn with their bases.
_REFIT = re.compile(rf'op_name="[^"]*(?:\({REFITS}\)|\(update_leaf\))/while"')


def traffic(hlo: str, ours: bool) -> tuple[Traffic, Traffic]:
    """What runs on every step, and what one turn of the refits adds."""
    entry, computations = targets.instructions(hlo)
    done = {}

    def of(name):
        if name not in done:
            done[name] = both = Traffic(), Traffic()
            types = {found.name: found.result for found in computations[name]}
            for found in computations[name]:
                both = tuple(a + b for a, b in zip(both, one(found, types), strict=True))
            done[name] = both
        return done[name]

    def one(found, types):
        if kind := _COLLECTIVE.fullmatch(found.opcode):
            return _of_collective(found, kind, types), Traffic()
        if _GOES_ON.search(found.line):
            return Traffic(), Traffic()
        if found.opcode == "conditional":
            names = [x for pair in _BRANCH.findall(found.line) for x in pair if x]
            branches = [of(name) for name in re.findall(r"[\w.\-]+", " ".join(names))]
            step, refit = (_most(x) for x in zip(*branches, strict=True))
        else:
            inner = [of(name) for name in _CALLED.findall(found.line)]
            step, refit = (
                (sum(x, Traffic()) for x in zip(*inner, strict=True)) if inner else 2 * [Traffic()]
            )
        if turns := _TURNS.search(found.line):
            step, refit = step * int(turns[1]), refit * int(turns[1])
        # optax.contrib.galore's refit is the one branch that it has
        refits = _REFIT.search(found.line) if ours else found.opcode == "conditional"
        return (Traffic(), step + refit) if refits else (step, refit)

    return of(entry)


def _most(branches) -> Traffic:
    largest = max(x.largest for x in branches)
    return dataclasses.replace(max(branches, key=lambda x: x.bytes), largest=largest)


def _of_collective(found, kind, types) -> Traffic:
    operands = found.line.split(f" {found.opcode}(", 1)[1].split(")", 1)[0]
    sent = [x for name in re.findall(r"%([\w.\-]+)", operands) for x in _arrays(types[name])]
    received = _arrays(found.result)
    if kind[2] and kind[1] in ("all-gather", "collective-permute"):
        received = received[len(sent) :]  # its result has the operands before
    size = lambda arrays: sum(numbers * width for numbers, width, _ in arrays)
    largest = max((numbers, text) for numbers, _, text in sent + received)
    return Traffic(1, max(size(sent), size(received)), largest)


def _arrays(types: str) -> list[tuple[int, int, str]]:
    """Numbers, bytes of each, and type of the arrays in a type."""
    found = []
    for dtype, dims in _ARRAY.findall(types):
        bits = re.search(r"\d+", dtype)
        width = max(1, int(bits[0]) // 8) if bits else 1
        found.append(
            (math.prod(map(int, filter(None, dims.split(",")))), width, f"{dtype}[{dims}]")
        )
    return found


def measure(target: str, optimizer: str, quick: bool) -> list[tuple[str, ...]]:
    """A row for each layout."""
    devices = jax.devices() if target == "cpu" else targets.devices(target, TARGETS[target])
    rows = []
    for layers, shape in layouts(target)[-1 if quick else 0 :]:
        candidates = targets.optimizers(RANK, stack=layers != "apart")
        ours = not optimizer.startswith("optax.")
        if optimizer not in candidates or (layers == "own" and not ours):
            continue
        mesh = Mesh(np.array(devices).reshape(shape), ("data", "model"))
        step, refit = traffic(compiled(candidates[optimizer], layers, mesh), ours)
        labels = (target, "×".join(map(str, shape)), layers, optimizer)
        rows.append((*labels, *step.cells(), *refit.cells()))
    return rows


if __name__ == "__main__":
    print("\n" + json.dumps({"rows": measure(**json.loads(sys.argv[1]))}))
