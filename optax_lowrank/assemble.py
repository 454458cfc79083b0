"""From a subspace part to an optimizer: which leaves are projected, weight decay, learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.accumulate import accumulated, at_window_end
from optax_lowrank.low_rank import keep_where
from optax_lowrank.views import MatrixView, axes_by_path, flatten_by_path

# What `optax.inject_hyperparams(alias, static_args=INJECT_STATIC_ARGS)` must not turn into traced arrays or schedules.
# Optax rejects names that an alias has not; so add "basis_bits" for `gradnormlorp`, and "update_proj_gap" if it is a
# policy.
INJECT_STATIC_ARGS = (
    "rank",
    "mask",
    "weight_dimension_numbers",
    "fit",
    "side",
    "mu_dtype",
    "rotate_moments",
    "dense",
    "state_bits",
    "accumulate",
    "seed",
)


def assemble(
    matrix: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int,
    inner: optax.GradientTransformation | None = None,
    dense: optax.GradientTransformation | None = None,
    axes: Any = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    owns_learning_rate: bool = False,
    accumulate: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """A complete optimizer from a transformation of the matrices and one of everything else.

    Matrices with min(m, n) > rank go to `matrix`, the other leaves to `dense`; then

        update = −η (direction + λ W),

    the decay in full space, never projected or multiplied by the scale of the subspace. A dense leaf whose gradient is
    not finite is skipped like a matrix of `low_rank`: zero direction, its state as before.

    Args:
      matrix: transformation of the matrix leaves, `low_rank(...)` or a chain with it.
      learning_rate: η, a number or a schedule.
      rank: matrices with a side no longer than this save nothing by projection, and are dense.
      inner: direction of the dense leaves, `optax.scale_by_adam()` by default; its moments are float32 even where the
        parameters are bfloat16.
      dense: a complete transformation of the dense leaves, in place of `inner`, η and λ.
      axes: overrides of `matrix_axes`; a pattern that matches no leaf is an error.
      weight_decay: λ.
      mask: which leaves decay: a tree like the parameters or a function of them, as in `optax.adamw`.
      accumulate: k micro-batches that make one update; `matrix` must have an `accumulated` inner then.
      owns_learning_rate: `matrix` applies η and λ itself, as `gradnormlorp` must.

    Returns:
      A transformation; `update` needs `params` only if something decays.

    Raises:
      ValueError: overrides do not fit the parameters (`init`).

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> tx = ol.assemble(ol.low_rank(optax.scale_by_lion(), rank=4), 1e-3, rank=4, inner=optax.scale_by_lion())
      >>> state = tx.init({"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)})
      >>> list(ol.diagnostics(state))
      ['kernel']
    """
    if dense is None:
        rest = _in_float32(accumulated(inner or optax.scale_by_adam(), accumulate))
    else:
        rest = accumulated(dense, accumulate)
    finished_outside = {"matrix": not owns_learning_rate, "dense": dense is None}

    def labels(tree):
        leaves, treedef = flatten_by_path(tree)
        found = axes_by_path(tree, axes, strict=False)

        def label(path, leaf):
            if found[path] is None:
                return "dense"
            view = MatrixView.of(leaf.shape, found[path])
            return "matrix" if min(view.m, view.n) > rank else "dense"

        return treedef.unflatten(label(path, leaf) for path, leaf in leaves.items())

    def takes(tree):
        return jax.tree.map(finished_outside.__getitem__, labels(tree))

    def decays(tree):
        chosen = mask(tree) if callable(mask) else True if mask is None else mask
        both = lambda choice, part: jax.tree.map(lambda taken: choice and taken, part)
        return jax.tree.map(both, chosen, takes(tree))  # a mask may be a prefix of the tree

    direction = optax.partition({"matrix": matrix, "dense": _guarded(rest)}, labels)
    after = [optax.masked(optax.scale_by_learning_rate(learning_rate), takes)]
    if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
        after.insert(0, optax.add_decayed_weights(weight_decay, decays))
    tx = optax.chain(direction, *(at_window_end(part, accumulate) for part in after))

    def init(params):
        whole = not any(
            isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(params, is_leaf=_is_masked)
        )
        if whole and jax.tree.leaves(params):
            axes_by_path(params, axes)  # raises if overrides do not fit
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _is_masked(x):
    return isinstance(x, optax.MaskedNode)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in float32 or wider: a bfloat16 second moment with b2 = 0.999 can never decay."""
    inner = optax.with_extra_args_support(inner)
    wide = lambda x: jnp.promote_types(x.dtype, jnp.float32)

    def like(p):
        # shapes only: a float32 copy of every dense parameter would be allocated just to be measured
        return (
            p
            if p.dtype == wide(p)
            else jax.ShapeDtypeStruct(p.shape, wide(p), sharding=_sharding(p))
        )

    def init(params):
        return inner.init(jax.tree.map(like, params))

    def update(updates, state, params=None, **extra):
        cast = jax.tree.map(lambda g: g.astype(wide(g)), updates)
        out, state = inner.update(cast, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), out, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _sharding(p):
    return p.sharding if isinstance(p, jax.Array) and not isinstance(p, jax.core.Tracer) else None


def _guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips leaves whose gradient is not finite: zero update, state as before."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        leaves, treedef = flatten_by_path(updates)
        finite = {path: jnp.all(jnp.isfinite(g)) for path, g in leaves.items()}
        zero_unless_finite = lambda tree: treedef.unflatten(
            jnp.where(ok, x, 0)
            for ok, x in zip(finite.values(), jax.tree.leaves(tree), strict=True)
        )
        out, new_state = inner.update(zero_unless_finite(updates), state, params, **extra)
        return zero_unless_finite(out), keep_where(finite, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)
