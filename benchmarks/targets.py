"""What XLA's compilers for NVIDIA GPUs and TPUs make of every optimizer, on a machine that has neither.

They need no device, only packages, and give the optimized program, the sizes of its buffers, and no times. Each
program is compiled in a process of its own (`python -m benchmarks.targets JOB`): the settings must be there before
JAX is imported, and a compilation can be stopped only together with its process.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import optax_lowrank as ol
from benchmarks import processes
from benchmarks.memory import BATCH, TIME, Model, in_bytes, mib
from benchmarks.tables import Table, bars
from benchmarks.trees import M60, M130, ONE_LAYER, QUICK, matrices, muon, shapes, step_of

_CARD = """
  gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} threads_per_core_limit: {threads}
    core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
    block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
    device_memory_size: {memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
    registers_per_core_limit: 65536 registers_per_block_limit: 65536
  }}
  platform_name: "CUDA" device_description_str: "{name}"
  dnn_version_info {{ major: 9 minor: 8 patch: 0 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
"""
# what XLA asks a card for, as its text proto `GpuTargetConfig`
CARDS = {
    "h100": _CARD.format(
        name="NVIDIA H100 80GB HBM3",
        **{"major": 9, "minor": 0, "cores": 132, "threads": 2048, "clock": 1.98},
        **{"shared": 233472, "optin": 232448, "l2": 52428800},
        **{"memory": 84978434048, "bandwidth": 3352320000000},
    ),
    "rtx4090": _CARD.format(
        name="NVIDIA GeForce RTX 4090",
        **{"major": 8, "minor": 9, "cores": 128, "threads": 1536, "clock": 2.52},
        **{"shared": 102400, "optin": 101376, "l2": 75497472},
        **{"memory": 25393692672, "bandwidth": 1008000000000},
    ),
}
# the smallest topology of each; any other is given by its own name, `v5e:4x4`
TOPOLOGIES = {"v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v5e": "v5e:2x2"}

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # look for no device
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # it would time kernels on a card
    "TPU_SKIP_MDS_QUERY": "1",  # what kind of TPU host is this? none
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody holds a TPU; the lock would outlive a killed process
    "OPENBLAS_NUM_THREADS": "1",
}

# A tree and whether its layers are stacked. LLaMA-1B and 7B as in the GaLore paper (arXiv:2403.03507, Table 5)
MODELS = {
    "quick": (QUICK, True),
    "60m": (M60, False),
    "130m": (M130, True),
    "1b": (ONE_LAYER[0]._replace(name="1B", layers=24), True),
    "7b": (ONE_LAYER[1]._replace(name="7B", layers=32), True),
}
VOCABULARY = 32_000

UPDATE, STEP = "update and apply", "training step"
ALIASES = (
    "galore",
    "fira",
    "natural_galore",
    "adarankgrad",
    "gradnormlorp",
    "apollo",
    "low_rank_muon",
)


def missing(target: str) -> str | None:
    """A sentence on what compiling for `target` lacks here; None where it lacks nothing."""
    module, extra = ("jax_plugins.xla_cuda12", "cuda") if target in CARDS else ("libtpu", "tpu")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the parent package
        found = None
    if found:
        return None
    return (
        f"{target} left out: its compiler is not installed; in a virtual environment of its own, "
        f'`pip install -e ".[targets-{extra}]"`.'
    )


def compilers(target: str) -> str:
    """One line on what compiled for `target`."""
    packages = ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12") if target in CARDS else ("libtpu",)
    versions = (
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", *packages)
    )
    return f"{target}: compiled, not run, by {', '.join(versions)}; {os.cpu_count()} cores"


def devices(target: str, count: int = 1) -> list:
    """Devices that can be compiled for but hold no array; a TPU topology has as many as it has."""
    if target not in CARDS:
        name = TOPOLOGIES.get(target, target)
        return topologies.get_topology_desc(topology_name=name, platform="tpu").devices
    shape = f"1x1x{count}"
    cards = {"topology_name": shape, "topology": shape, "platform": "cuda"}
    return topologies.get_topology_desc(target_config=CARDS[target], **cards).devices


def lower_for(fun: Callable, args: tuple, target: str, donate: Sequence[int] = ()):
    """`jax.jit(fun)` lowered for one device of `target`; `.compile()` gives the program. `args` may be shapes."""
    place = jax.sharding.SingleDeviceSharding(devices(target)[0])
    jitted = jax.jit(fun, in_shardings=place, out_shardings=place, donate_argnums=donate)
    return jitted.lower(*args)


def bytes_of(compiled) -> dict[str, int]:
    """Bytes of a compiled program: `temporaries`, `peak` and `code` (0 where the compiler does not say)."""
    stats = compiled.memory_analysis()
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )
    code = stats.generated_code_size_in_bytes
    return {"temporaries": stats.temp_size_in_bytes, "peak": peak, "code": code}


def full_size_float32(compiled, leaf_shapes: Iterable[Sequence[int]]) -> list[str]:
    """Instructions outside refits that write a float32 array as large as a leaf of those shapes.

    An array counts if it has the leaf's axes in some order, merged or not. One inside a fusion is never written to
    memory and does not count; nor does what only the branch of a conditional computes, as refits do.
    """
    merged = set().union(*(_merged(tuple(shape)) for shape in leaf_shapes))
    found = []
    for name, result, opcode in _executed(compiled.as_text()):
        shapes_ = (tuple(map(int, filter(None, d.split(",")))) for d in _FLOAT32.findall(result))
        if opcode not in _MOVES_NOTHING and any(_axes(shape) in merged for shape in shapes_):
            found.append(f"{name} = {result} {opcode}")
    return found


_FLOAT32 = re.compile(r"\bf32\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"\b(?:body|to_apply)=%?([\w.\-]+)")
_MOVES_NOTHING = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "optimization-barrier",
    *("while", "conditional", "call"),  # what they run is counted there
}


class Instruction(NamedTuple):
    """Of a compiled program."""

    name: str
    result: str  # its type
    opcode: str
    line: str


def instructions(hlo: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Where a program starts, and the instructions of each of its computations."""
    computations, entry = collections.defaultdict(list), None
    for line in hlo.splitlines():
        if opened := _COMPUTATION.match(line):
            current = opened[2]
            entry = current if opened[1] else entry
        elif found := _INSTRUCTION.match(line):
            computations[current].append(Instruction(*found.groups(), line))
    return entry, computations


def _executed(hlo: str) -> Iterator[tuple[str, str, str]]:
    """Name, type and opcode of each instruction that runs on every step."""
    entry, computations = instructions(hlo)
    waiting, seen = [entry], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for found in computations[name]:
            yield found[:3]
            if found.opcode in ("while", "call"):
                waiting += _CALLED.findall(found.line)


def _axes(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


@functools.cache
def _merged(shape: tuple[int, ...]) -> frozenset[tuple[int, ...]]:
    """The sizes of all arrays that axes of `shape` can be merged to."""
    found = {_axes(shape)}
    for i, j in itertools.combinations(range(len(shape)), 2):
        rest = [size for k, size in enumerate(shape) if k not in (i, j)]
        found |= _merged((shape[i] * shape[j], *rest))
    return frozenset(found)


def optimizers(rank: int, stack: bool) -> dict[str, optax.GradientTransformation]:
    """All that are compared: every alias, with float32 and with 8-bit state."""
    r = {"rank": rank}
    found = {"optax.adamw": optax.adamw(1e-3), "optax.contrib.muon": muon(1e-3)}
    if not stack:  # it takes no stacked layers: it would be plain Adam
        found["optax.contrib.galore"] = optax.contrib.galore(1e-3, **r)
    for name in ALIASES:
        if alias := getattr(ol, name, None):
            bases = {"basis_bits": 8} if name == "gradnormlorp" else {}
            found[name] = alias(1e-3, **r)
            found[f"{name}, 8 bits"] = alias(1e-3, state_bits=8, **bases, **r)
    return found


@dataclasses.dataclass(frozen=True)
class Job:
    """One program: which step of which optimizer on which model, and for what."""

    target: str
    model: str
    program: str
    optimizer: str


def jobs(
    target: str,
    models: Sequence[str],
    methods: Sequence[str] = (),
    programs: Sequence[str] = (UPDATE, STEP),
) -> list[Job]:
    """Updates with every optimizer, then training steps of stacked layers with those that divide a whole model."""
    found = []
    for model in models:
        size, stack = MODELS[model]
        names = [
            n for n in optimizers(size.rank, stack) if not methods or n.split(",")[0] in methods
        ]
        found += [Job(target, model, UPDATE, name) for name in names]
        if stack:
            wholes = (name for name in names if not name.startswith("optax.contrib"))
            found += [Job(target, model, STEP, _layerwise(name)) for name in wholes]
    return [job for job in found if job.program in programs]


def _layerwise(name: str) -> str:
    """Whoever saves memory saves it there, too."""
    return f"{name}, layer-wise" if name.endswith("8 bits") else name


def program(job: Job) -> tuple[Callable, tuple, dict]:
    """The function to compile, its arguments and the parameters of the layers, as shapes; weights in bfloat16."""
    size, stack = MODELS[job.model]
    name, layerwise, _ = job.optimizer.partition(", layer-wise")
    tx = optimizers(size.rank, stack)[name]
    if job.program == UPDATE:
        params = shapes(size, stack, jnp.bfloat16)
        return step_of(tx), (params, jax.eval_shape(tx.init, params), params), params
    model = Model(size, stack, dtype=jnp.bfloat16, vocab=VOCABULARY)
    if layerwise:
        step, state = model.layerwise(tx)
    else:
        step, state = model.step(tx), jax.eval_shape(tx.init, model.params)
    return step, (model.params, state, model.tokens), model.params["layers"]


def measure(job: Job) -> dict:
    """Bytes and seconds of one compilation, in this process."""
    size, _ = MODELS[job.model]
    fun, args, layers = program(job)
    start = time.perf_counter()
    lowered = lower_for(fun, args, job.target, donate=(0, 1))
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    matrix = min(map(math.prod, matrices(size).values()))
    leaves = {x.shape for x in jax.tree.leaves(layers) if x.size >= matrix}
    seconds = {"trace": traced - start, "compile": end - traced}
    found = full_size_float32(compiled, leaves)
    state = in_bytes(args[1])
    return {**bytes_of(compiled), **seconds, "state": state, "float32": found}


def in_child(job: Job, timeout: float = 900) -> dict:
    """`measure(job)` in a process of its own, or {"error": a sentence}."""
    return processes.in_child(
        "benchmarks.targets", dataclasses.asdict(job), ENVIRONMENT, timeout=timeout
    )


HEADER = (
    "target",
    "model",
    "program",
    "optimizer",
    "state, MiB",
    "temporaries, MiB",
    "peak, MiB",
    "full-size float32",
    "trace, s",
    "compile, s",
    "code, MiB",
)


def targets(
    target: str,
    models: Sequence[str],
    methods: Sequence[str] = (),
    measured: Callable[[Job], dict] = in_child,
    programs: Sequence[str] = (UPDATE, STEP),
) -> Table:
    """Compiled for a device that is not here, and not run: bfloat16 weights and gradients, weights, state donated."""
    rows, temporaries = [], collections.defaultdict(dict)
    for job in jobs(target, models, methods, programs):
        found = measured(job)
        rows.append((*_labels(job), *_cells(found)))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
        if "error" not in found:
            title = f"{target}, {MODELS[job.model][0].name}, {job.program}"
            temporaries[title][job.optimizer] = found["temporaries"] / 2**20
    note = (
        "From `compiled.memory_analysis()`: peak = arguments + outputs + temporaries − aliased. A training step is "
        f"that of a Llama of {VOCABULARY:,} words on {BATCH} × {TIME} tokens, layers recomputed; 8 bits are the "
        "moments, in gradnormlorp the bases, too. Full-size float32: instructions outside refits that write a float32 "
        "array as large as a leaf of the layers, and in its shape. Seconds are this machine's."
    )
    figure = bars("temporaries, MiB (compiled, not run)", temporaries) if temporaries else None
    return Table(HEADER, rows, (note,), figure)


def _labels(job: Job) -> tuple[str, ...]:
    size, stack = MODELS[job.model]
    how = "stacked" if stack else "layers apart"
    model = f"{size.name}, {how}"
    return f"{job.target}, compiled, not run", model, job.program, job.optimizer


def _cells(found: dict) -> tuple[str, ...]:
    if "error" in found:
        return (found["error"].replace("|", "/"), *("–",) * 6)
    code = mib(found["code"]) if found["code"] else "–"
    seconds = (f"{found['trace']:.1f}", f"{found['compile']:.1f}")
    sizes = (mib(found[key]) for key in ("state", "temporaries", "peak"))
    return (*sizes, str(len(found["float32"])), *seconds, code)


def _child(job: Job) -> dict:
    try:
        return measure(job)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": "does not fit: " + str(error).splitlines()[0]}


if __name__ == "__main__":
    print("\n" + json.dumps(_child(Job(**json.loads(sys.argv[1])))))
