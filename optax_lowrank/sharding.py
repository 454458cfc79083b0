"""Where the arrays of an optimizer state live on a mesh, given where the parameters live."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowrank.views import (
    MatrixAxes,
    MatrixView,
    axes_by_path,
    flatten_by_path,
    leaf_path,
    owner,
)


def state_shardings(
    tx: optax.GradientTransformation, params: Any, param_shardings: Any, axes: Any = None
) -> Any:
    """Shardings of the state of any optimizer of this library, for `jax.jit(tx.init, out_shardings=...)`.

    An array of a parameter's shape lies as the parameter does. The long axes of bases (b, m, r) and coordinates
    (b, r, n) lie as the axes of the parameter that they were folded from; ranks, statistics and counts are replicated.

    Args:
      tx: the optimizer.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      param_shardings: a tree like `params` of `jax.sharding.NamedSharding`s, all on one mesh.
      axes: the overrides of `matrix_axes` that `tx` was made with.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`s.

    Raises:
      ValueError: `param_shardings` is not like `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> params = {"kernel": jnp.ones((32, 64))}
      >>> along = {"kernel": NamedSharding(mesh, PartitionSpec(None, "model"))}
      >>> shardings = ol.state_shardings(ol.galore(0.01, rank=4), params, along)
      >>> state = shardings[0].inner_states["matrix"].inner_state
      >>> [tuple(x.spec) for x in (state.inner.mu["kernel/R"], state.basis["kernel"])]
      [(None, None, 'model'), (None, None, None)]
    """
    leaves, _ = flatten_by_path(params)
    placed, _ = flatten_by_path(param_shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
    if placed.keys() != leaves.keys():
        raise ValueError(
            f"`param_shardings` must be like `params`: it has {sorted(placed)}, they have {sorted(leaves)}."
        )
    found = axes_by_path(params, axes)

    def place(key_path, x):
        path = owner(key_path, leaves)
        if path is None:
            return NamedSharding(next(iter(placed.values())).mesh, PartitionSpec())
        mesh, spec = placed[path].mesh, placed[path].spec
        if x.shape == leaves[path].shape:
            return NamedSharding(mesh, spec)
        if found[path] is None or x.ndim != 3:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(
            mesh, _folded_spec(key_path, x.shape, leaves[path].shape, found[path], spec)
        )

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _folded_spec(key_path, shape, leaf_shape, axes: MatrixAxes, spec) -> PartitionSpec:
    """Spec of a (b, ·, ·) array: each of its axes that is a whole side of the leaf's matrix lies as that side does."""
    view = MatrixView.of(leaf_shape, axes, "reduction")
    sides = [(view.m, view.projected_axes), (view.n, view.other_axes)]
    names = [getattr(part, "name", None) for part in key_path]
    if "basis" not in names:
        axis, sides = 2, sides[::-1]  # coordinates (b, r, n), magnitudes (b, 1, n)
    else:
        axis = 1  # of a square matrix the reduction side is projected
        coded = names[-1] if names[-1] in ("codes", "pairs", "block_scale") else None
        if leaf_path(key_path[:-1] if coded else key_path).endswith("/R"):
            sides = sides[::-1]  # the inner basis of a two-sided projection
        if coded == "pairs":
            sides = [(-(-size // 2), members) for size, members in sides]
        elif coded == "block_scale":
            sides = []
    entries = [_merged(spec, view.batch_axes), None, None]
    match = [members for size, members in sides if size == shape[axis]]
    if match:
        entries[axis] = _merged(spec, match[0])
    return PartitionSpec(*entries)


def _merged(spec, axes):
    """What of a leaf's spec holds for axes merged into one: that of the first, if the others are not sharded."""
    entries = [spec[axis] if axis < len(spec) else None for axis in axes]
    return entries[0] if entries and not any(entries[1:]) else None
