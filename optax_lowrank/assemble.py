"""From a transformation of matrices to an optimizer: which leaves are projected, weight decay, learning rate."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.classify import Rank, axes_by_path, describe, ranks_by_path, views_by_path
from optax_lowrank.low_rank import low_rank_states
from optax_lowrank.refresh import positions
from optax_lowrank.rules import OfRuleState, in_dtypes_of, is_finite, put_back, wide
from optax_lowrank.views import flatten_by_path
from optax_lowrank.walls import AxisName, automatic, mean_over


class OptimizerState(NamedTuple):
    """State of `assemble`."""

    direction: optax.PartitionState  # `inner_states`: "matrix" and "dense"
    count: jax.Array  # () int32, calls of `update` so far


def assemble(
    matrix: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank,
    inner: optax.GradientTransformation | None = None,
    dense: optax.GradientTransformation | None = None,
    axes: Any = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    owns_learning_rate: bool = False,
    accumulate: int = 1,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """A complete optimizer from a transformation of the matrices and one of everything else.

    Matrices with min(m, n) > rank go to `matrix`, the other leaves to `dense`; then

        update = −η (direction + λ W),

    the decay in full space, never projected or multiplied by the scale of the subspace. A dense leaf whose gradient is
    not finite, or overflows in a square, is skipped like a matrix of `low_rank`: zero update, no decay, its state as
      before.

    Args:
      matrix: transformation of the matrix leaves, `low_rank(...)` or a chain with it. No learning rate in it, or steps
        go uphill: `low_rank(optax.adam(1e-3), ...)` is an optimizer of matrices by itself, and `assemble` takes
        `low_rank(optax.scale_by_adam(), ...)`.
      learning_rate: η, a number or a schedule.
      rank: as in `low_rank`; matrices with a side no longer than this save nothing by projection, and are dense.
      inner: direction of the dense leaves, `optax.scale_by_adam()` by default; its moments are float32 even where the
        parameters are bfloat16. No learning rate in it: `optax.sgd` would step uphill, and is refused.
      dense: a complete transformation of the dense leaves, with its own rate and decay, in place of `inner`, η and λ.
      axes: overrides of `matrix_axes`; a pattern that matches no leaf is an error.
      weight_decay: λ.
      mask: which leaves decay: a tree like the parameters or a function of them, as in `optax.adamw`.
      owns_learning_rate: `matrix` applies η and λ itself, as `gradnormlorp` must.
      accumulate: k micro-batches that make one update; `matrix` must have an `accumulated` rule then.
      axis_name: mesh axes along which gradients differ, as in `low_rank`; `matrix` must know of them, too.

    Returns:
      A transformation; `update` needs `params` only if something decays.

    Raises:
      TypeError, ValueError: an argument is no transformation, number or mask (here); `dense` steps uphill or `inner`
        holds a learning rate, overrides or mask do not fit the parameters (`init`); gradients and parameters differ.

    Warns:
      UserWarning: not a single leaf is projected (`init`).

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> tx = ol.assemble(ol.low_rank(optax.scale_by_lion(), rank=4), 1e-3, rank=4, inner=optax.scale_by_lion())
      >>> state = tx.init({"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)})
      >>> list(ol.diagnostics(state))
      ['kernel']
    """
    checks.rate("learning_rate", learning_rate)
    checks.number("weight_decay", weight_decay, 0)
    checks.transformation("matrix", matrix)
    finished_here = {"matrix": not owns_learning_rate, "dense": dense is None}
    labels = functools.partial(_labels, axes=axes, rank=rank)
    rest = _of_the_rest(dense, inner, accumulate)
    direction = optax.partition({"matrix": matrix, "dense": rest}, labels)
    rate_at = learning_rate if callable(learning_rate) else lambda _: learning_rate
    never_decays = isinstance(weight_decay, (int, float)) and weight_decay == 0

    def init(params):
        checks.arrays(params)
        if _is_whole(params):
            _check_whole(params, axes, rank, None if never_decays and callable(mask) else mask)
        return OptimizerState(direction.init(params), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        checks.state(state, OptimizerState)
        checks.alike(updates, params)
        parts = flatten_by_path(labels(updates))[0]
        updates = _dense_averaged(updates, parts, axis_name)
        with checks.noted("`update` takes gradients of the parameters that `init` was called for."):
            out, new = direction.update(updates, state.direction, params, **extra)
        rate = rate_at(state.count // accumulate)
        decay = jnp.where((state.count + 1) % accumulate == 0, weight_decay, 0)
        decaying = {} if never_decays else _decaying(mask, params)
        taken = {} if never_decays else _taken(updates, new, axes)

        def finish(path, u):
            if not finished_here[parts[path]]:
                return u
            x = u.astype(wide(u))
            if path in decaying:
                x = x + jnp.where(taken[path], decay, 0) * decaying[path].astype(x.dtype)
            return (-jnp.asarray(rate, x.dtype) * x).astype(u.dtype)

        leaves, treedef = flatten_by_path(out)
        out = treedef.unflatten(finish(path, u) for path, u in leaves.items())
        return out, OptimizerState(new, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, automatic(update))


def _of_the_rest(dense, inner, accumulate):
    """The transformation of the dense leaves: `dense` as it is, or `inner` in float32."""
    if dense is not None:
        return _guarded(_summed(checks.probed("dense", dense, downhill=True), accumulate))
    if inner is not None:
        inner = checks.probed("inner", inner, downhill=False)
    return _guarded(_in_float32(_summed(inner or optax.scale_by_adam(), accumulate)))


def _check_whole(params, axes, rank, mask):
    """Raises where overrides or mask do not fit the parameters, and warns where nothing is projected."""
    _decaying(mask, params)
    axes_by_path(params, axes)
    if "matrix" not in jax.tree.leaves(_labels(params, axes, rank)):
        dense_only = "no leaf is projected: this is an optimizer of dense leaves."
        warnings.warn(f"{dense_only}\n{describe(params, axes, rank=rank)}", stacklevel=3)


def _labels(tree, axes, rank):
    """A tree like this one of "matrix", where projection saves something, and "dense"."""
    _, treedef, views = views_by_path(tree, axes)
    ranks = ranks_by_path({path: view for path, view in views.items() if view}, rank)
    projected = lambda path, view: view and min(view.m, view.n) > ranks[path]
    return treedef.unflatten("matrix" if projected(*x) else "dense" for x in views.items())


def _dense_averaged(updates, parts, axis_name):
    leaves, treedef = flatten_by_path(updates)
    mean = lambda path, g: mean_over(axis_name, g) if parts[path] == "dense" else g
    return treedef.unflatten(mean(path, g) for path, g in leaves.items())


def _summed(dense, k):
    """Steps of `dense` with the mean of k micro-batches: of their sum, so that one which is skipped counts as zero."""
    if k == 1:
        return dense
    of_mean = optax.chain(optax.scale(1 / k), dense)
    steps = optax.MultiSteps(of_mean, int(k), use_grad_mean=False)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


def _is_whole(params):
    """Whether this is a tree of parameters, and not a part of one or none."""
    leaves = jax.tree.leaves(params, is_leaf=_is_masked)
    return bool(leaves) and not any(map(_is_masked, leaves))


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def _structure(tree):
    """The same of a tree and of the part of it that `optax.masked` shows."""
    return jax.tree.structure(tree, is_leaf=_is_masked)


def _decaying(mask, params) -> dict[str, jax.Array]:
    """The weights that decay, by path; a mask may be a prefix of them."""
    checks.weights("`weight_decay`", params)
    chosen = mask(params) if callable(mask) else True if mask is None else mask
    kind = "`mask` must be a tree of bools like the parameters, or a function of them"
    for choice in jax.tree.leaves(chosen):
        if choice not in (True, False):
            raise TypeError(f"{kind}; it has {checks.shown(choice)}.")
    try:
        whole = jax.tree.broadcast(chosen, params)
    except ValueError as error:
        raise ValueError(f"{kind}; {error}") from error
    chosen, weights = flatten_by_path(whole)[0], flatten_by_path(params)[0]
    return {path: W for path, W in weights.items() if chosen.get(path)}


def _taken(updates, state, axes) -> dict[str, jax.Array]:
    """For each leaf whether its step was taken: an array that broadcasts against it, one bool a matrix."""
    leaves, _, views = views_by_path(updates, axes)
    taken = {}
    for part in low_rank_states(state):
        places = positions({path: views[path].batch for path in part.leaves})
        for path, place in places.items():
            taken[path] = views[path].per_matrix(part.stats.finite[place])
    return taken | {path: is_finite(g) for path, g in leaves.items() if path not in taken}


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in float32 or wider: a bfloat16 second moment with b2 = 0.999 can never decay."""
    inner = optax.with_extra_args_support(inner)

    def like(p):
        # shapes only: a float32 copy of every dense parameter would be allocated just to be measured
        if p.dtype == wide(p):
            return p
        concrete = isinstance(p, jax.Array) and not isinstance(p, jax.core.Tracer)
        return jax.ShapeDtypeStruct(p.shape, wide(p), sharding=p.sharding if concrete else None)

    def init(params):
        return inner.init(jax.tree.map(like, params))

    def update(updates, state, params=None, **extra):
        cast = jax.tree.map(lambda g: g.astype(wide(g)), updates)
        out, new = inner.update(cast, state, params, **extra)
        out = jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates)
        return out, in_dtypes_of(state, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips leaves whose gradient is not finite: zero update, state as before.

    What belongs to a leaf is told by structure: the subtrees of the state that are trees like the gradients, and the
    states of rules, which are kept by path.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        finite = jax.tree.map(is_finite, updates)
        usable = jax.tree.map(lambda ok, g: jnp.where(ok, g, jnp.zeros_like(g)), finite, updates)
        out, new = inner.update(usable, state, params, **extra)
        out = jax.tree.map(lambda ok, u: jnp.where(ok, u, jnp.zeros_like(u)), finite, out)
        shape = _structure(updates)
        like_updates = lambda node: _structure(node) == shape
        of_rule = lambda node: isinstance(node, OfRuleState) and isinstance(node.leaves, dict)
        by_path, _ = flatten_by_path(finite)

        def keep(new, old):
            if of_rule(new):
                pairs = {path: (x, old.leaves[path]) for path, x in new.leaves.items()}
                return new._replace(leaves={p: put_back(by_path[p], *x) for p, x in pairs.items()})
            if not like_updates(new):
                return new
            where = lambda ok, new, old: new if _is_masked(ok) else put_back(ok, new, old)
            return jax.tree.map(where, finite, new, old, is_leaf=_is_masked)

        whole = lambda node: like_updates(node) or of_rule(node)
        return out, jax.tree.map(keep, new, state, is_leaf=whole)

    return optax.GradientTransformationExtraArgs(inner.init, update)
