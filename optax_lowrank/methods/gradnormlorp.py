"""GradNormLoRP: magnitude and direction of every weight vector apart, the direction's gradient projected on both sides.

Huang et al., arXiv:2412.19616. Column norms ‖·‖, one a unit of output, gauge V = W, so that no copy of W is kept:

    M = ‖W‖,   Ŵ = W / M,   D_M = Σ_rows D ∘ Ŵ,   D_V = D − Ŵ D_M
    V' = W − η α U Adam(Uᵀ D_V K) Kᵀ,   M' = M − η (Adam(D_M) + λ M),   W' = M' V' / ‖V'‖
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.classify import views_by_path
from optax_lowrank.low_rank import Geometry
from optax_lowrank.options import Options, alias
from optax_lowrank.rules import Rule, accumulated, lifted, wide
from optax_lowrank.views import flatten_by_path


def tangent(D: jax.Array, W: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The gradient D_V of the direction, in the dtype of D, and (M, D_M), one number a unit of output.

    Args:
      D, W: gradient and weights of one matrix.
      axis: the one that the layer sums over.
    """
    W, G = W.astype(wide(W)), D.astype(wide(D))
    M = _norm(W, axis)
    # a column of zeros gets Ŵ = 0, all of D as D_V, and no magnitude gradient
    unit = W / jnp.where(M > 0, M, 1)
    D_M = jnp.sum(G * unit, axis=axis, keepdims=True)
    return (G - unit * D_M).astype(D.dtype), (M, D_M)


def difference(W: jax.Array, M: jax.Array, u_V: jax.Array, u_M: jax.Array, axis: int) -> jax.Array:
    """M' V' / ‖V'‖ − W with V' = W + u_V, M' = M + u_M, as W δ + u_V (1 + δ) with δ = M' / ‖V'‖ − 1.

    No weights are subtracted, so that u = 0 gives 0 exactly.
    """
    smallest = jnp.finfo(W.dtype).tiny
    u_M = jnp.maximum(u_M, smallest - M)
    # ‖V'‖² − M²; of a factor 2 XLA for CPUs would make an array as large as W
    more = jnp.sum(u_V * (W + W + u_V), axis=axis, keepdims=True)
    # of a V' that u_V has all but cancelled a sum of squares says nothing: it counts as a thousandth of V
    norm = jnp.sqrt(jnp.maximum(jnp.square(M) + more, 1e-6 * jnp.square(M)))
    growth = more / jnp.maximum(norm + M, smallest)  # ‖V'‖ − M
    # nothing to rescale where W had no direction, or V' has none
    moves = (smallest < M) & (norm > smallest)
    delta = jnp.where(moves, (u_M - growth) / jnp.maximum(norm, smallest), 0)
    return W * delta + u_V * (1 + delta)


def _norm(W, axis):
    return jnp.sqrt(jnp.sum(jnp.square(W), axis=axis, keepdims=True))


class WeightNormState(NamedTuple):
    """State of `weight_norm`; nothing of its own, and no copy of the weights."""

    inner: optax.OptState


def weight_norm(
    inner: optax.GradientTransformation, axes: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Updates the magnitudes and directions of weight vectors, one vector a unit of output, instead of the weights.

    With u_V, u_M the updates of `inner` for the direction V = W and the magnitude M = ‖W‖:

        update = (M + u_M) (W + u_V) / ‖W + u_V‖ − W,

    in float32 and without subtracting weights, so that zero gradients give an update of exactly zero. A magnitude stops
    at the smallest normal number instead of changing sign. A column of zeros has no direction: it moves by u_V.

    Args:
      inner: transformation that includes the learning rate. For each leaf it gets `{"direction": D_V, "magnitude":
        D_M}`, the tangential gradient as (b, m, n) with the reduction side first, and (b, 1, n); as `params` W and M
        likewise.
      axes: overrides of `matrix_axes`.

    Returns:
      A transformation that needs `params` and must not be followed by a learning rate: the update is not linear in it.
      A matrix whose gradient is not finite gets a zero gradient and a zero update.

    Raises:
      ValueError: a leaf has no matrix view, or `update` is called without `params`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> W = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
      >>> tx = ol.weight_norm(optax.sgd(0.5))
      >>> tangential = {"kernel": jnp.array([[0.8, 0.0], [-0.6, 0.0]])}
      >>> update, _ = tx.update(tangential, tx.init(W), W)
      >>> jnp.linalg.norm(W["kernel"] + update["kernel"], axis=0).tolist()
      [5.0, 1.0]

    Reference: Salimans and Kingma, arXiv:1602.07868, equation 3; Huang et al., arXiv:2412.19616. The authors' code
      keeps a full copy of W, drops the tangential projection, and forgets the learned magnitude on every step.
    """
    inner = optax.with_extra_args_support(inner)

    def views_of(tree):
        leaves, treedef, views = views_by_path(tree, axes, "reduction")
        dense = [path for path, view in views.items() if view is None]
        if dense:
            raise ValueError(
                f"`weight_norm` has no matrix view for {dense}. Use `optax.masked` or `assemble`."
            )
        return views, leaves, treedef

    def init(params):
        views, leaves, _ = views_of(params)
        if not views:  # see `low_rank`
            return WeightNormState(jnp.zeros([]))

        def pair(path, view):
            like = lambda m: jax.ShapeDtypeStruct((view.batch, m, view.n), wide(leaves[path]))
            return {"direction": like(view.m), "magnitude": like(1)}

        return WeightNormState(inner.init({path: pair(path, view) for path, view in views.items()}))

    def update(updates, state, params=None, **extra):
        checks.weights("`weight_norm`", params)
        views, grads, treedef = views_of(updates)
        if not views:
            return updates, state
        weights, _ = flatten_by_path(params)
        W, D, usable = {}, {}, {}
        for path, view in views.items():
            V = view.fold(weights[path]).astype(wide(weights[path]))
            D_V, (M, D_M) = tangent(view.fold(grads[path]).astype(V.dtype), V, 1)
            # what is not finite in D shows in D_M, since 0 · ∞ is not a number
            ok = jnp.isfinite(jnp.sum(jnp.square(D_M), axis=(1, 2), keepdims=True))
            W[path] = {"direction": V, "magnitude": M}
            D[path] = {"direction": jnp.where(ok, D_V, 0), "magnitude": jnp.where(ok, D_M, 0)}
            usable[path] = ok
        u, inner_state = inner.update(D, state.inner, W, **extra)
        out = {}
        for path, view in views.items():
            new = difference(*W[path].values(), *u[path].values(), axis=1)
            out[path] = view.unfold(jnp.where(usable[path], new, 0).astype(grads[path].dtype))
        return treedef.unflatten(out.values()), WeightNormState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def normalised(
    magnitude: Rule,
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike,
    accumulate: int = 1,
) -> Geometry:
    """Weight normalisation as the geometry of `low_rank`: magnitudes by a rule of their own, η and λ inside.

    Args:
      magnitude: rule of the (1, units) gradient D_M.
      learning_rate: η; the update is not linear in it.
      decay: λ, which acts on magnitudes: on directions the norm would undo it.
      accumulate: micro-batches of an update.
    """
    magnitude = accumulated(magnitude, accumulate)
    rate_at = learning_rate if callable(learning_rate) else lambda _: learning_rate
    units = lambda x: x.reshape(1, -1)

    def init(W, axis):
        return magnitude.init(jnp.zeros((1, W.shape[1 - axis]), W.dtype))

    def retract(U, W, kept, state, *, axis, count, **extra):
        M, D_M = kept
        N, _, state = magnitude.step(units(D_M), None, state, count=count, **extra)
        last = (count + 1) % accumulate == 0
        N = N.reshape(M.shape) + jnp.where(last, decay, 0).astype(M.dtype) * M
        step = -jnp.asarray(rate_at(count // accumulate), M.dtype)
        return difference(W.astype(M.dtype), M, step * U.astype(M.dtype), step * N, axis), state

    return Geometry(init, tangent, retract, reads_weights=True)


@alias()
def gradnormlorp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    two_sided: bool = True,
    basis_bits: Literal[8, 4] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """GradNormLoRP: weight normalisation, and a two-sided projection of the direction's gradient.

    W' = M' V' / ‖V'‖ with V' = W − η α U N Kᵀ, N = Adam(Uᵀ D_V K) of r × r, and M' = M − η (Adam(D_M) + λ M), one
    magnitude a unit of output. State: (m + n)·r + 2·r² + 2·(units of output) floats a matrix. Of the options,
    `scale` is of the direction's step only, and `weight_decay` acts on magnitudes.

    Args:
      learning_rate: η, a number or a schedule.
      **options: see `Options`.
      two_sided: project both sides; otherwise one, `side`, with moments of r × n.
      basis_bits: 8 or 4 keeps bases in codes of so many bits, orthonormal again where they are used (`InCodes`).

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: an option is wrong; dimension numbers do not fit (`init`); `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.float32)}
      >>> report = ol.memory_report(ol.gradnormlorp(0.01, rank=1024), shapes)
      >>> report.arrays == 4 * ((4096 + 11008) * 1024 + 2 * 1024**2 + 2 * 11008)
      True

    Reference: Huang et al., arXiv:2412.19616; the update rule from its two key equations, since the authors' code does
      not follow them (see `weight_norm`).
    """
    options = Options(**options)
    if two_sided:
        options = dataclasses.replace(options, side="both")

    def direction(decay):
        magnitude = options.coded(lifted(options.adam()))
        return options.projected(
            options.moments(),
            scale=options.scale,
            geometry=normalised(magnitude, learning_rate, decay, options.accumulate),
            basis_bits=basis_bits,
        )

    matrix = direction(options.weight_decay)
    if options.mask is not None:
        parts = {"decayed": matrix, "not decayed": direction(0.0)}
        matrix = optax.partition(parts, lambda tree: _decay_labels(options.mask, tree))
    return options.optimizer(learning_rate, matrix, owns_learning_rate=True)


def _decay_labels(mask, tree):
    """A decay mask as labels of the part of the parameters that `optax.partition` has left in `tree`."""
    chosen = jax.tree.broadcast(mask(tree) if callable(mask) else mask, tree)  # from a prefix
    return jax.tree.map(lambda choice: "decayed" if choice else "not decayed", chosen)
