"""Several devices and several processes: which of them holds which part of what is trained.

A mesh has two axes.  `data` splits the batch, and the parameters as well (FSDP); `model` splits the parameters alone
(tensor parallelism).  The compiler derives every transfer from where the arrays lie, so that no model code mentions
devices but for `llama.over_data` and `llama.whole_rows`, which keep activations with their rows of the batch.

Several processes run the same program: each draws the same batches, hands its own rows to its devices, and writes
its part of a checkpoint.  The first one alone prints and writes the other files.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

AXES = ("data", "model")
OPTIONS = {"mesh", "coordinator", "num_processes", "process_id", "distributed"}


# ---------------------------------------------------------------------------------------------------- options


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--mesh",
        type=parse_mesh,
        metavar="AXIS=DEVICES,…",
        help="devices along data (batch and parameters are split) and model (parameters are split), "
        "e.g. data=4,model=2; None: one device, or with several processes data over all devices",
    )
    p.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes of a TPU pod, Slurm or MPI, which say how many there are",
    )
    p.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, a free port: this is one of --num-processes started by hand",
    )
    p.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator")
    p.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: 0 to N - 1")


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,model=2` as `{"data": 4, "model": 2}`; an axis that is left out has one device."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r}: write it as data=4,model=2, data=8 or model=8"
            )
        sizes[axis] = int(size)
    return sizes


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    by_hand = (args.coordinator, args.num_processes, args.process_id)
    if any(x is not None for x in by_hand):
        if None in by_hand:
            p.error("--coordinator, --num-processes and --process-id go together")
        if not 0 <= args.process_id < args.num_processes:
            p.error(f"--process-id {args.process_id} must be below {args.num_processes}, from 0 on")
    if args.compile_only and (args.mesh or args.distributed or args.coordinator):
        p.error("--compile-only compiles for one device: leave --mesh and processes out")


# -------------------------------------------------------------------------------------------------- processes


def connect(args: argparse.Namespace) -> None:
    """Join the other processes; before JAX looks for devices, and once."""
    if not (args.distributed or args.coordinator) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except ValueError as error:
        raise SystemExit(
            f"--distributed finds no cluster here ({error}). Without one, start each process with "
            "--coordinator HOST:PORT --num-processes N --process-id I."
        ) from error


def is_first() -> bool:
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_one_first(name: str) -> Iterator[None]:
    """The first process goes through before the others: what it writes, they read."""
    if not is_first():
        wait_for_all(name)
    try:
        yield
    finally:
        if is_first():
            wait_for_all(name)


def in_any_process(flag: bool) -> bool:
    """Whether the flag is set in some process.  All must call this at the same step."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


# ------------------------------------------------------------------------------------------------------- mesh


def make_mesh(sizes: dict[str, int] | None, rows: int) -> Mesh | None:
    """The devices of all processes, or as many as it takes of a single one; None: what `sizes` leaves to JAX.

    Args:
        sizes: of `AXES`.
        rows: of a batch, which the axis `data` must divide.
    """
    devices = jax.device_count()
    if sizes is None:
        if jax.process_count() == 1:
            return None
        sizes = {"data": devices, "model": 1}
    wanted = math.prod(sizes.values())
    name = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    if wanted > devices or (wanted < devices and jax.process_count() > 1):
        raise SystemExit(f"--mesh {name} is {wanted} devices; JAX finds {devices}.")
    if rows % sizes["data"]:
        raise SystemExit(f"--mesh {name}: data must divide the {rows} rows of a (micro-)batch.")
    return jax.make_mesh(
        tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def within(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


class Places(NamedTuple):
    """Shardings of what a training step takes and returns; one sharding in place of a tree holds for all of it."""

    params: Any
    opt_state: Any
    batch: Sharding
    scalar: Sharding


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Kernels and embeddings are split over both axes of the mesh, norms lie everywhere.

    `model` takes the larger of a matrix's two axes that it divides, the last of two equal ones, and `data` the larger
    of those left.  So gate and up projections are split by columns and down projections by rows, over the inner width,
    and embedding and head over the vocabulary.  Of two equal axes `o_proj` has the first one split, as it takes what
    q, k and v have split by columns.  Stacked layers are not split along the stack, since a scan goes along it.
    """

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec: list[str | None] = [None] * x.ndim
        if "kernel" in name or "embedding" in name:
            free = sorted((x.ndim - 2, x.ndim - 1), reverse="o_proj" not in name)
            free.sort(
                key=lambda axis: -x.shape[axis]
            )  # stable: the order above holds for equal ones
            for of_mesh in ("model", "data"):
                size = mesh.shape[of_mesh]
                divided = [axis for axis in free if size > 1 and x.shape[axis] % size == 0]
                if divided:
                    spec[divided[0]] = of_mesh
                    free.remove(divided[0])
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, params)


def places(step: Any, mesh: Mesh | None) -> Places | None:
    """Where the state of a `steps.Whole` or `LayerWise` and its batches lie."""
    if mesh is None:
        return None
    params = param_shardings(step.shapes, mesh)
    batch = NamedSharding(mesh, PartitionSpec("data"))
    return Places(params, step.state_shardings(params), batch, NamedSharding(mesh, PartitionSpec()))


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole: each keeps what its own devices hold."""

    def one(x: Any, sharding: Sharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)
