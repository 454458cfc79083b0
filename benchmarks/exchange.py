"""What devices that hold gradients of their own exchange in an update, counted in the traced program."""

import functools
import math

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

import optax_lowrank as ol
from benchmarks.memory import mib
from benchmarks.tables import Options, Table
from benchmarks.trees import M130, QUICK, REFITS, all_shapes, shapes

GAP = 200  # updates between refits
METHODS = (ol.galore, ol.natural_galore, ol.adarankgrad, ol.gradnormlorp, ol.fira)


def exchange(options: Options) -> Table:
    """What data parallelism averages over devices, in float32; whole gradients are what AdamW exchanges."""
    size = QUICK if options.quick else M130
    whole = 4 * sum(m * n for m, n in all_shapes(size))
    rows = [("optax.adamw", "–", mib(whole), "–", mib(whole), "100 %")]
    for make in METHODS[::4] if options.quick else METHODS:
        for share in (8, 32):
            rank = max(1, size.hidden // share)
            tx = make(1e-3, rank=rank, update_proj_gap=GAP, axis_name="data")
            step, refit = averaged(tx, shapes(size, stack=True))
            mean = step + refit / GAP
            cells = (make.__name__, f"{rank} = d / {share}", mib(step), mib(refit), mib(mean))
            rows.append((*cells, f"{mean / whole:.1%}"))
    header = ("optimizer", "rank", "step, MiB", "refit of all, MiB", "mean, MiB", "of AdamW's")
    note = (
        f"The matrices of LLaMA-{size.name}, a refit every {GAP} updates; `fira` weighs columns of the whole gradient. "
        "Where a branch decides, the larger one is counted."
    )
    return Table(header, rows, (note,))


def averaged(tx: optax.GradientTransformation, params) -> tuple[int, int]:
    """Bytes that are averaged in an update without refits, and in a refit of every matrix."""
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def update(grads, state, params):
        return tx.update(jax.lax.pcast(grads, "data", to="varying"), state, params)

    sharded = jax.shard_map(update, mesh=mesh, in_specs=(P(), P(), P()), out_specs=P())
    traced = jax.jit(sharded).trace(params, jax.eval_shape(tx.init, params), params)
    count = functools.partial(_count, traced.jaxpr.jaxpr)
    total, step = count(refits=True), count(refits=False)
    return step, total - step


def _count(jaxpr, refits: bool, turns: int = 1) -> int:
    """Bytes of the operands of `psum`; `turns` is what a loop of unknown length takes."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name")
        if name == REFITS:
            if not refits:
                continue
            turns = eqn.invars[-1].aval.size  # one a matrix
        inner = [_count(x, refits, turns) for x in jax.tree.leaves(_jaxprs(eqn))]
        if eqn.primitive.name.startswith("psum"):
            total += sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in eqn.invars)
        elif eqn.primitive.name == "cond":
            total += max(inner)
        else:
            repeats = {"scan": eqn.params.get("length"), "while": turns}
            total += sum(inner) * repeats.get(eqn.primitive.name, 1)
    return total


def _jaxprs(eqn):
    is_one = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    found = [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_one) if is_one(x)]
    return [x.jaxpr if hasattr(x, "jaxpr") else x for x in found]
