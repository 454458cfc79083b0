"""Walls: what XLA must not reorder, and what holds outside jit, inside `shard_map` and with explicit axes as well.

Memory is the reason for `after`. Left alone, XLA lifts the steps of all leaves before it applies the first, and
decodes the moments of all before it updates one; in turn, the temporaries of a step are those of one leaf.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AxisName = str | tuple[str, ...] | None


def after(before: tuple[jax.Array, Any] | None, compute: Callable[..., Any], *operands: Any) -> Any:
    """`compute(*operands)`, which inside jit does not begin before another leaf is done.

    `before` is the update of that leaf and new state to look at in its place, if any. What `compute` returns as it got
    it may be there at once.
    """
    update = None if before is None else before[0]
    if not isinstance(update, jax.core.Tracer) or not update.size:
        return compute(*operands)  # outside jit everything has its turn

    def waiting(before, *operands):
        return compute(
            *lax.platform_dependent(before, operands, tpu=_selected, default=_behind_barrier)
        )

    def branch(before, *operands):
        # XLA for CPU drops barriers, but computes a predicate first
        given, same = jax.tree.leaves(operands), {}

        def new(*operands):  # a branch would copy what `compute` returns as it got it
            ids = {id(x): i for i, x in enumerate(jax.tree.leaves(operands))}
            out, tree = jax.tree.flatten(compute(*operands))
            same.update(tree=tree, index=[ids.get(id(x)) for x in out])
            return [x for x in out if id(x) not in ids]

        zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(new, *operands)]
        made = iter(cond(_never(before[0]), lambda *_: zeros, new, *operands))
        return same["tree"].unflatten(next(made) if i is None else given[i] for i in same["index"])

    return lax.platform_dependent(before, *operands, cpu=branch, default=waiting)


def _never(before):
    """False, which XLA does not know: it must compute `before` first."""
    first = before[(0,) * before.ndim]  # flattened, a sharded array would be gathered
    return (first.astype(jnp.int32) & 0x7FFFFFFF) < 0


def _selected(before, operands):
    # XLA for TPU drops barriers before it orders the program; this it fuses into what reads the operands
    update, state = before
    largest = max((x for x in jax.tree.leaves(state) if x.ndim == 3), key=jnp.size, default=update)
    # Looked at, an update is written out, beside the weights that it is applied to. New moments, (b, r, n), are looked
    # at instead, but where they are codes, for which it takes more memory.
    never = _never(largest if jnp.issubdtype(largest.dtype, jnp.floating) else update)
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), operands)


def _behind_barrier(before, operands):
    wait = lambda x: lax.optimization_barrier((x, before[0]))[0]
    # in a `shard_map` one by one, as what goes through a barrier together varies alike over devices
    return jax.tree.map(wait, operands) if _in_shard_map() else wait(operands)


def when(pred: Any, update: Callable[[Any], Any], x: Any) -> Any:
    """`update(x)` where `pred` holds, else `x`, in place.

    A loop of one turn or none: a branch of `lax.cond` copies what it returns as it was. And an update of a slice in it
    has one result, where XLA for CPU otherwise repeats the update in a copy for each reader.
    """
    return loop(jnp.asarray(pred, jnp.int32), lambda _, x: update(x), x)


def unmoved(i: jax.Array, compute: Callable[..., Any], *operands: Any) -> Any:
    """`compute(*operands)` in a branch, with a number i ≥ 0 that XLA does not know.

    What all branches do, XLA for TPUs does behind them: they then return, as a copy, what they did it to, which is a
    stack where they took an entry of one. It leaves alone what is in a loop.
    """

    def once(*operands):
        shapes = jax.eval_shape(compute, *operands)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return when(i >= 0, lambda _: compute(*operands), start)

    return lax.platform_dependent(*operands, tpu=once, default=compute)


def loop(turns: jax.Array | int, body: Callable[[jax.Array, Any], Any], x: Any) -> Any:
    """`lax.fori_loop` from 0 to `turns`, whose arrays are updated in place; a plain one outside jit."""
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((turns, x))):
        for turn in range(int(turns)):
            x = body(turn, x)
        return x
    if _in_shard_map():
        varying = _axes((jax.eval_shape(body, jnp.int32(0), x), turns, x))
        x, body = _vary(x, varying), _varying(body, varying)
    return lax.fori_loop(jnp.int32(0), turns, body, x)


def for_each(chosen: jax.Array, body: Callable[[jax.Array, Any], Any], x: Any) -> Any:
    """`x = body(i, x)` for every i where `chosen` (k,) holds, in order."""
    passed = jnp.cumsum(chosen, dtype=jnp.int32)  # to sort them is slow to compile for TPUs
    turn = lambda n, x: body(jnp.sum(passed <= n, dtype=jnp.int32), x)
    return loop(jnp.sum(chosen, dtype=jnp.int32), turn, x)


def cond(pred: Any, true: Callable[..., Any], false: Callable[..., Any], *operands: Any) -> Any:
    """`lax.cond`; a plain `if` outside jit, where a branch would be compiled anew on every call."""
    if not isinstance(pred, jax.core.Tracer):
        return true(*operands) if pred else false(*operands)
    if _in_shard_map():
        varying = _axes(jax.eval_shape(lambda: (true(*operands), false(*operands))))
        true, false = (_varying(branch, varying) for branch in (true, false))
    return lax.cond(pred, true, false, *operands)


def entry(stack: Any, i: Any) -> Any:
    """Entry i of every array of a stack."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), stack)


def put(stack: Any, i: Any, one: Any) -> Any:
    """The stack with its entry i replaced, in a loop in place."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), stack, one)


def put_in(stacks: tuple[Any, ...], which: jax.Array, i: Any, one: Any) -> tuple[Any, ...]:
    """The stacks with entry i of number `which` replaced, in place; as they are where `which` is negative.

    A stack of smaller entries gets the beginning of it.
    """

    def turn(carry):
        stack, left = carry
        first = jax.tree.map(lambda x, y: y[tuple(map(slice, x.shape[1:]))], stack, one)
        return put(stack, i, first), left - 1

    written, left = [], which
    for stack in stacks:
        # A loop of one turn or none, as in `when`. Its condition counts down through the loops before it: with a number
        # of its own in it, each would be compiled by itself.
        stack, left = lax.while_loop(lambda carry: carry[1] == 0, turn, (stack, left))
        written.append(stack)
        left -= 1
    return tuple(written)


def automatic(update: Callable[..., Any]) -> Callable[..., Any]:
    """The `update` of a transformation, in which on a mesh with explicit axes the compiler places what is in between.

    What comes out lies as what went in.
    """
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray)

    @functools.wraps(update)
    def placed(updates, state, params=None, **extra):
        given = filter(is_array, jax.tree.leaves((updates, state, params, extra)))
        meshes = (jax.typeof(x).sharding.mesh for x in given)
        mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
        if mesh is None:
            return update(updates, state, params, **extra)

        def place(x):  # one that was made outside of the mesh comes back replicated on it
            sharding = jax.typeof(x).sharding
            return sharding if sharding.mesh.axis_types else NamedSharding(mesh, PartitionSpec())

        # what is no array cannot be an argument in there, and an array of the mesh cannot but be one
        arrays = {name: x for name, x in extra.items() if is_array(x)}
        rest = {name: x for name, x in extra.items() if name not in arrays}
        step = lambda updates, state, params, arrays: update(
            updates, state, params, **arrays, **rest
        )
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        out = jax.tree.map(place, (updates, state))
        step = jax.sharding.auto_axes(step, axes=axes, out_sharding=out)
        return step(updates, state, params, arrays)

    return placed


def _in_shard_map():
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def vary_alike(*trees: Any, but: AxisName = None) -> Any:
    """The trees, all arrays varying over the devices of a `shard_map` where one of them does, `but` over these axes."""
    axes = _axes(trees) - set((but,) if isinstance(but, str) else but or ())
    return _vary(trees, axes) if axes else trees


def mean_over(axis_name: AxisName, tree: Any) -> Any:
    """The mean over mesh axes of a `shard_map`, if there are any."""
    if axis_name is None:
        return tree
    try:
        return lax.pmean(tree, axis_name)
    except NameError as error:
        where = "call `update` inside of `jax.shard_map`, on a mesh that has it"
        raise NameError(f"`axis_name={axis_name!r}` is no axis here: {where}.") from error


def _varying(branch, axes):
    return lambda *operands: _vary(branch(*operands), axes)


def _vary(tree, axes):
    def leaf(x):
        missing = tuple(sorted(axes - _axes(x)))
        if not missing:
            return x
        return (
            lax.pcast(x, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, missing)
        )

    return jax.tree.map(leaf, tree)


def _axes(tree) -> frozenset[str]:
    """Mesh axes over which an array of the tree varies."""
    found = frozenset()
    for x in jax.tree.leaves(tree):
        kind = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        manual = getattr(kind, "manual_axis_type", None)
        found |= manual.varying if manual is not None else getattr(kind, "vma", None) or frozenset()
    return found
