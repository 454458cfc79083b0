"""The order of a computation: leaf after leaf, so that what a leaf needs in between is alive for one leaf at a time.

A compiler is free to decode the state of all leaves before it updates the first, and XLA does.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal


def in_turn(fun: Callable[[Any], Any], argument: Any, of_leaf: Callable[[Any], str | None]) -> Any:
    """`fun(argument)`, in which the arrays of a leaf wait for the results of the leaf before.

    The function is traced, and its results are then asked for leaf by leaf; whatever they share is computed once. A
    function that mixes leaves gives the same result, in more memory.

    Args:
      fun: function of one tree of arrays.
      argument: that tree.
      of_leaf: from the key path of an array in `argument` or in the result to the leaf it belongs to, or to None.

    Returns:
      What `fun` returns.
    """
    traced, shape = jax.make_jaxpr(fun, return_shape=True)(argument)
    jaxpr = traced.jaxpr
    if jaxpr.effects:  # prints and the like, which belong to no result
        return fun(argument)
    inputs, known = defaultdict(list), dict(zip(jaxpr.constvars, traced.consts, strict=True))
    keyed = jax.tree_util.tree_leaves_with_path(argument)
    for var, (key_path, x) in zip(jaxpr.invars, keyed, strict=True):
        known[var] = x
        inputs[of_leaf(key_path)].append(var)
    outputs = defaultdict(list)
    keyed, treedef = jax.tree_util.tree_flatten_with_path(shape)
    for var, (key_path, _) in zip(jaxpr.outvars, keyed, strict=True):
        outputs[of_leaf(key_path)].append(var)

    before: list[jax.Array] = []
    for leaf, wanted in outputs.items():
        if leaf is not None:
            waiting = [known[var] for var in inputs[leaf]]
            known |= dict(zip(inputs[leaf], _after(waiting, before), strict=True))
        known |= _evaluate(jaxpr, known, wanted)
        before = [_read(known, var) for var in wanted]
    return treedef.unflatten(_read(known, var) for var in jaxpr.outvars)


def _read(known, var):
    return var.val if isinstance(var, Literal) else known[var]


def _evaluate(jaxpr, known, wanted):
    """All new values on the way to `wanted`."""
    made_by = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    needed, given, todo = set(), {}, list(wanted)
    while todo:
        var = todo.pop()
        if isinstance(var, Literal):
            continue
        if var in known:
            given[var] = known[var]
        elif made_by[var] not in needed:
            needed.add(made_by[var])
            todo += jaxpr.eqns[made_by[var]].invars
    eqns = [jaxpr.eqns[i] for i in sorted(needed)]
    made = [var for eqn in eqns for var in eqn.outvars]
    part = jaxpr.replace(constvars=[], invars=list(given), outvars=made, eqns=eqns)
    return dict(zip(made, jax.core.eval_jaxpr(part, [], *given.values()), strict=True))


def _after(xs, before):
    """`xs`, not to be had before the arrays in `before`."""
    if not before or not any(isinstance(x, jax.core.Tracer) for x in xs):
        return xs  # outside jit everything has its turn

    def plus_zero(xs, before):
        # XLA for CPU drops optimization barriers. A conditional needs its operands whole, and the compiler does not
        # know that this one always takes the second branch.
        first = lambda y: jnp.ravel(y)[0].astype(jnp.int32)
        never = (first(before[0]) & 0x7FFFFFFF) < 0
        zero = lax.cond(never, lambda ys: sum(map(first, ys)), lambda ys: 0, before)
        return [x + zero.astype(x.dtype) for x in xs]

    barrier = lambda xs, before: lax.optimization_barrier((xs, before))[0]
    return lax.platform_dependent(xs, before, cpu=plus_zero, default=barrier)
