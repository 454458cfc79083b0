"""GradNormLoRP: magnitude and direction of every weight vector apart, the direction's gradient projected on both sides.

Huang et al., arXiv:2412.19616. Column norms ‖·‖, one a unit of output, gauge V = W, so that no copy of W is kept:

    M = ‖W‖,   Ŵ = W / M,   D_M = Σ_rows D ∘ Ŵ,   D_V = D − Ŵ D_M
    V' = W − η α U Adam(Uᵀ D_V K) Kᵀ,   M' = M − η (Adam(D_M) + λ M),   W' = M' V' / ‖V'‖
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.accumulate import accumulated, at_window_end
from optax_lowrank.assemble import assemble
from optax_lowrank.bases import basis_store
from optax_lowrank.fits import Fit, randomized_svd
from optax_lowrank.low_rank import keep_where, low_rank
from optax_lowrank.quantize import StateBits, adam_moments
from optax_lowrank.refresh import Policy, as_policy, in_windows
from optax_lowrank.views import MatrixAxes, MatrixView, axes_by_path, flatten_by_path


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
      inner: transformation that includes the learning rate. For each leaf it gets `<path>`, the tangential gradient
        D_V as (b, m, n) with the reduction side first, and `<path>/magnitude`, D_M as (b, 1, n); as `params` W and M.
      axes: overrides of `matrix_axes`.

    Returns:
      A transformation that needs `params` and must not be followed by a learning rate: the update is not linear in it.
      A matrix whose gradient is not finite is skipped: zero update, its state as before.

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
        leaves, treedef = flatten_by_path(tree)
        found = axes_by_path(tree, axes, strict=False)
        dense = [path for path in leaves if found[path] is None]
        if dense:
            raise ValueError(
                f"`weight_norm` has no matrix view for {dense}. Use `optax.masked` or `assemble`."
            )
        views = {
            path: MatrixView.of(leaf.shape, found[path], "reduction")
            for path, leaf in leaves.items()
        }
        return views, leaves, treedef

    def init(params):
        views, leaves, _ = views_of(params)
        if not views:  # see `low_rank`
            return WeightNormState(jnp.zeros([]))
        struct = lambda path, m, n: jax.ShapeDtypeStruct(
            (views[path].batch, m, n), _wide(leaves[path])
        )
        return WeightNormState(
            inner.init(
                _pair(
                    {path: struct(path, view.m, view.n) for path, view in views.items()},
                    {path: struct(path, 1, view.n) for path, view in views.items()},
                )
            )
        )

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "`weight_norm` needs the weights: call `tx.update(grads, state, params)`."
            )
        views, grads, treedef = views_of(updates)
        if not views:
            return updates, state
        weights, _ = flatten_by_path(params)
        W = {
            path: view.fold(weights[path]).astype(_wide(weights[path]))
            for path, view in views.items()
        }
        D = {path: view.fold(grads[path]).astype(W[path].dtype) for path, view in views.items()}
        M = {path: _column_norm(w) for path, w in W.items()}
        # a column of zeros gets Ŵ = 0, all of D as D_V, and no magnitude gradient
        unit = {path: W[path] / jnp.where(M[path] > 0, M[path], 1) for path in views}
        D_M = {path: jnp.sum(D[path] * unit[path], axis=1, keepdims=True) for path in views}
        # what is not finite in D shows in D_M, since 0 · ∞ is not a number
        finite = {path: jnp.all(jnp.isfinite(d), axis=(1, 2)) for path, d in D_M.items()}
        usable = {path: ok[:, None, None] for path, ok in finite.items()}
        D_V = {path: jnp.where(usable[path], D[path] - unit[path] * D_M[path], 0) for path in views}
        D_M = {path: jnp.where(usable[path], D_M[path], 0) for path in views}

        u, inner_state = inner.update(_pair(D_V, D_M), state.inner, _pair(W, M), **extra)
        out = {}
        for path, view in views.items():
            new = _difference(W[path], M[path], u[path], u[f"{path}/magnitude"])
            out[path] = view.unfold(jnp.where(usable[path], new, 0).astype(grads[path].dtype))
        return treedef.unflatten(out.values()), WeightNormState(
            keep_where(finite, inner_state, state.inner)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(W, M, u_V, u_M):
    """M' V' / ‖V'‖ − W with V' = W + u_V, M' = M + u_M, as W δ + u_V (1 + δ) with δ = M' / ‖V'‖ − 1."""
    smallest = jnp.finfo(W.dtype).tiny
    u_M = jnp.maximum(u_M, smallest - M)
    norm = _column_norm(W + u_V)
    growth = jnp.sum(u_V * (2 * W + u_V), axis=1, keepdims=True) / jnp.maximum(
        norm + M, smallest
    )  # ‖V'‖ − M
    # nothing to rescale where W had no direction, or V' has none
    delta = jnp.where(
        (smallest < M) & (norm > smallest), (u_M - growth) / jnp.maximum(norm, smallest), 0
    )
    return W * delta + u_V * (1 + delta)


def _column_norm(W):
    return jnp.sqrt(jnp.sum(jnp.square(W), axis=1, keepdims=True))


def _pair(directions, magnitudes):
    return directions | {f"{path}/magnitude": x for path, x in magnitudes.items()}


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def gradnormlorp(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int | Policy = 200,
    scale: jax.typing.ArrayLike = 0.25,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    fit: Fit | None = None,
    side: Literal["short", "long"] = "short",
    rotate_moments: bool = False,
    dense: optax.GradientTransformation | None = None,
    state_bits: StateBits = None,
    accumulate: int = 1,
    seed: int = 0,
    two_sided: bool = True,
    basis_bits: Literal[8, 4] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GradNormLoRP: `weight_norm` over a two-sided projection of the direction's gradient.

    W' = M' V' / ‖V'‖ with V' = W − η α U N Kᵀ, N = Adam(Uᵀ D_V K) of r × r, and M' = M − η (Adam(D_M) + λ M), one
    magnitude a unit of output. State: (m + n)·r + 2·r² + 2·(units of output) floats a matrix.

    Args:
      learning_rate: η, a number or a schedule.
      rank: r, the cap on both sides. Matrices with a side no longer than this are not projected.
      update_proj_gap: T, optimizer updates between refreshes, which may be traced; or a refresh policy, such as
        `every(200, stagger=True)`.
      scale: α, of the direction's step only.
      b1, b2, eps, mu_dtype: of Adam.
      weight_decay: λ, decoupled. It acts on magnitudes: on directions the norm would undo it.
      mask: which leaves decay, as in `optax.adamw`.
      weight_dimension_numbers: which axes make the matrix, and which of them are the output: overrides of
        `matrix_axes`.
      fit: how a basis is chosen; default `randomized_svd()`. The paper's is `svd()`.
      side: "short" or "long", the side that is projected first, or alone.
      rotate_moments: carry the moments over to the new basis at a refresh; the paper leaves them as they are.
      dense: a complete transformation, with its own learning rate, for the leaves that are not projected.
      state_bits: 8 keeps moments as 8-bit codes (`quantize_state`) and bases in bfloat16; a dict of arguments of
        `quantize_state`, such as {"min_size": 256}, does so in its own way.
      accumulate: k micro-batches that make one update. Their gradients are summed in the subspace (`accumulated`), and
        updates in between are zero; `update_proj_gap` and schedules count the real ones.
      seed: of the random sketches.
      two_sided: project both sides; otherwise one, with moments of r × n.
      basis_bits: 8 or 4 keeps bases in codes of so many bits, orthonormal again where they are used (`InCodes`).

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError, ValueError: a bad `rank`, `side`, `update_proj_gap` or `basis_bits`; `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.float32)}
      >>> report = ol.memory_report(ol.gradnormlorp(0.01, rank=1024), shapes)
      >>> report.arrays == 4 * ((4096 + 11008) * 1024 + 2 * 1024**2 + 2 * 11008)
      True

    Reference: Huang et al., arXiv:2412.19616; the update rule from its two key equations, since the authors' code does
      not follow them (see `weight_norm`).
    """
    adam = functools.partial(adam_moments, b1, b2, eps, mu_dtype, state_bits=state_bits)
    common = {
        "rank": rank,
        "fit": fit or randomized_svd(),
        "refresh": in_windows(as_policy(update_proj_gap), accumulate),
        "seed": seed,
        "basis_store": basis_store(state_bits, basis_bits),
    }
    sides = ("rotation", "column_rotation") if two_sided else ("rotation",)
    inner = accumulated(adam(rotate=rotate_moments), accumulate, sides if rotate_moments else ())
    if two_sided:
        inner = low_rank(inner, side="long" if side == "short" else "short", **common)
    # `weight_norm` hands over (b, m, n), whatever the leaf's name
    direction = low_rank(inner, side=side, scale=scale, axes=MatrixAxes(1, 2), **common)
    step = at_window_end(optax.scale_by_learning_rate(learning_rate), accumulate)

    def normalised(decay):
        magnitude = accumulated(optax.chain(adam(), optax.add_decayed_weights(decay)), accumulate)
        parts = {
            "direction": optax.chain(direction, step),
            "magnitude": optax.chain(magnitude, step),
        }
        part = lambda tree: {
            k: "magnitude" if k.endswith("/magnitude") else "direction" for k in tree
        }
        return weight_norm(optax.partition(parts, part), weight_dimension_numbers)

    if mask is None:
        matrix = normalised(weight_decay)
    else:
        parts = {"decayed": normalised(weight_decay), "not decayed": normalised(0.0)}
        matrix = optax.partition(parts, lambda tree: _decay_labels(mask, tree))
    return assemble(
        matrix,
        learning_rate,
        rank=rank,
        inner=adam(),
        dense=dense,
        axes=weight_dimension_numbers,
        weight_decay=weight_decay,
        mask=mask,
        owns_learning_rate=True,
        accumulate=accumulate,
    )


def _decay_labels(mask, tree):
    """A decay mask as labels of the part of the parameters that `optax.partition` has left in `tree`."""
    chosen = mask(tree) if callable(mask) else mask
    label = lambda choice, part: jax.tree.map(
        lambda _: "decayed" if choice else "not decayed", part
    )
    return jax.tree.map(label, chosen, tree)  # a mask may be a prefix of the tree
