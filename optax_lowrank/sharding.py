"""Where the arrays of an optimizer state live on a mesh, given where the parameters live.

Steps and refits multiply with a sharded gradient where it lies: what travels is r columns or rows wide, never a matrix.
Exceptions are `svd()` and `dct()`, Muon's products, and stacks that are split along their layers, see below.

Data parallelism can exchange less than gradients. With `axis_name`, inside `jax.shard_map`, each device gives its own
gradient, and what is averaged are coordinates, r · n numbers instead of m · n, and at refits sketches:

    >>> import functools, jax, jax.numpy as jnp, optax, optax_lowrank as ol
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    >>> tx = ol.galore(1e-2, rank=2, axis_name="data")
    >>> def step(params, state, x, y):
    ...     loss = lambda p: jnp.mean((x @ p["kernel"] - y) ** 2)  # of the device's own rows
    ...     own = jax.lax.pcast(params, "data", to="varying")  # or `jax.grad` sums whole gradients
    ...     updates, state = tx.update(jax.grad(loss)(own), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> rows = (P(), P(), P("data"), P("data"))
    >>> step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=P()))
    >>> x, y = jax.random.normal(jax.random.key(0), (64, 8)), jnp.ones((64, 6))
    >>> params = {"kernel": jnp.zeros((8, 6))}
    >>> params, state = step(params, tx.init(params), x, y)  # equal on all devices
    >>> bool(jnp.any(params["kernel"] != 0))
    True

The compiler would gather each layer of a stack that is split along its layers. In a `shard_map` along that axis every
device fits its own; other automatic axes of the mesh remain the compiler's. The state is for that many devices, inside
such a `shard_map` alone:

    >>> mesh = jax.make_mesh((jax.device_count(),), ("stage",), axis_types=(AxisType.Auto,))
    >>> tx = ol.fira(1e-2, rank=2, weight_dimension_numbers={"kernel": ol.MatrixAxes(-2, -1)})
    >>> layers = {"kernel": jnp.ones((16, 6, 8))}
    >>> specs = jax.tree.map(lambda x: P("stage") if x.ndim else P(), jax.eval_shape(tx.init, layers))
    >>> own = functools.partial(jax.shard_map, mesh=mesh, axis_names={"stage"})
    >>> init = own(tx.init, in_specs=P("stage"), out_specs=specs)
    >>> update = own(tx.update, in_specs=(P("stage"), specs, P("stage")), out_specs=(P("stage"), specs))
    >>> updates, _ = jax.jit(update)(layers, init(layers), layers)
    >>> updates["kernel"].shape
    (16, 6, 8)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowrank.classify import axes_by_path
from optax_lowrank.low_rank import low_rank_states
from optax_lowrank.refit import TwoSided
from optax_lowrank.views import MatrixAxes, MatrixView, flatten_by_path, owned_leaves


def state_shardings(
    tx: optax.GradientTransformation,
    params: Any,
    param_shardings: Any,
    axes: Any = None,
    spread: bool = False,
) -> Any:
    """Shardings of the state of any optimizer of this library, for `jax.jit(tx.init, out_shardings=...)`.

    An array of a parameter's shape lies as the parameter does. The long axes of bases (b, m, r) and coordinates
    (b, r, n) lie as the axes of the parameter that they were folded from; ranks, statistics and counts are replicated.

    Args:
      tx: the optimizer.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      param_shardings: a tree like `params` of `jax.sharding.NamedSharding`s, all on one mesh.
      axes: the overrides of `matrix_axes` that `tx` was made with.
      spread: split arrays over the mesh axes of their parameter that they do not follow, too, wherever the size of an
        axis allows: a basis of the side that is not sharded, for one, lies everywhere otherwise. No device holds more
        than its part then, and a step gathers m · r or r · n numbers of a matrix.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`s.

    Raises:
      TypeError, ValueError: `param_shardings` are no `NamedSharding`s, or not like `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> params = {"kernel": jnp.ones((32, 64))}
      >>> along = {"kernel": NamedSharding(mesh, PartitionSpec(None, "model"))}
      >>> shardings = ol.state_shardings(ol.galore(0.01, rank=4), params, along)
      >>> leaf = shardings.direction.inner_states["matrix"].inner_state.leaves["kernel"]
      >>> [tuple(x.spec) for x in (leaf.rule.mu, leaf.basis)]
      [(None, None, 'model'), (None, None, None)]
    """
    leaves, _ = flatten_by_path(params)
    placed, _ = flatten_by_path(param_shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
    if placed.keys() != leaves.keys():
        raise ValueError(
            f"`param_shardings` must be like `params`: it has {sorted(placed)}, they have {sorted(leaves)}."
        )
    for path, sharding in placed.items():
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"`param_shardings` must be `NamedSharding`s; {path!r} has {sharding}. Without a mesh, `tx.init` alone "
                "puts the state where the parameters are."
            )
    found = axes_by_path(params, axes)
    mesh = next(iter(placed.values())).mesh if placed else None
    shapes = jax.eval_shape(tx.init, params)
    states = [leaf for x in low_rank_states(shapes) for leaf in x.leaves.items()]
    two_sided = {path for path, leaf in states if isinstance(leaf.basis, TwoSided)}

    def follow(keys, x, path):
        spec, names = placed[path].spec, [getattr(key, "name", None) for key in keys]
        if x.shape == leaves[path].shape and not {"basis", "rule"} & set(names):
            return spec
        if found[path] is None or not {"basis", "rule", "geometry"} & set(names):
            return _leading(spec, leaves[path].shape, x.shape)
        short = "rule" in names and path in two_sided  # (b, r, r)
        return _folded(names, x, leaves[path].shape, found[path], spec, short)

    def place(keys, x, path):
        spec = PartitionSpec() if path is None else follow(keys, x, path)
        if spread and path is not None:
            spec = _spread(spec, x.shape, placed[path].spec, mesh)
        # two 4-bit codes share a byte, and a mesh that divides a side need not divide its bytes
        return fitting(NamedSharding(mesh, spec), x.shape)

    keyed = owned_leaves(shapes, params)
    return jax.tree.structure(shapes).unflatten(place(*one) for one in keyed)


def _leading(spec, leaf_shape, shape) -> PartitionSpec:
    """Spec of codes' scales (..., blocks): the leading axes lie as the parameter's."""
    if len(shape) != len(leaf_shape) or shape[:-1] != leaf_shape[:-1]:
        return PartitionSpec()
    return PartitionSpec(*[_merged(spec, [axis]) for axis in range(len(shape) - 1)])


def _folded(names, x, leaf_shape, axes: MatrixAxes, spec, short) -> PartitionSpec:
    """Spec of an array (b, ...) of a leaf: each axis that is a whole side of the leaf's matrix lies as that side does.

    Only the long axes are told, by their size: of a basis (b, m, r) the one before the last, of all else the last;
    `short` arrays have none.
    """
    view, shape = MatrixView.of(leaf_shape, axes, "reduction"), x.shape
    sides = [(view.m, view.projected_axes), (view.n, view.other_axes)]
    entries = [_merged(spec, view.batch_axes), *[None] * (len(shape) - 1)]
    in_basis = "basis" in names
    if len(shape) >= 3 and names[-1] != "block_scale" and not short:
        axis = len(shape) - (2 if in_basis else 1)
        # of a square matrix the reduction side is projected
        sides = sides if in_basis != ("K" in names) else sides[::-1]
        along = [members for size, members in sides if shape[axis] == size]
        if x.dtype == jnp.uint8:  # two 4-bit codes share a byte
            along += [members for size, members in sides if shape[axis] == -(-size // 2)]
        if along:
            entries[axis] = _merged(spec, along[0])
    return PartitionSpec(*entries)


def _spread(spec, shape, of_parameter, mesh) -> PartitionSpec:
    """Spec with each mesh axis of the parameter's that it lacks, on the longest free axis that this one divides."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    names = lambda spec: [n for x in spec if x for n in (x if isinstance(x, tuple) else (x,))]
    for name in names(of_parameter):
        free = [i for i, x in enumerate(entries) if x is None and shape[i] % mesh.shape[name] == 0]
        if free and name not in names(entries):
            entries[max(free, key=lambda i: shape[i])] = name
    return PartitionSpec(*entries)


def _merged(spec, axes):
    """What of a leaf's spec holds for axes merged into one: that of the first, if the others are not sharded."""
    entries = [spec[axis] if axis < len(spec) else None for axis in axes]
    return entries[0] if entries and not any(entries[1:]) else None


def fitting(sharding, shape):
    """The sharding, without axes that it does not divide."""
    if not isinstance(sharding, NamedSharding):
        return sharding

    def fits(size, names):
        names = (names,) if isinstance(names, str) else names or ()
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    pairs = zip(shape, sharding.spec, strict=False)
    spec = PartitionSpec(*[names if fits(size, names) else None for size, names in pairs])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
