"""Other ranks for a running optimizer: memory released or added between steps, and checkpoints of such states.

Inside jit the rank is a mask: columns of a basis beyond the active rank are zero, but allocated. Outside, `resize` and
`compact` cut or widen every array that has a rank for an axis, whichever rule keeps it: the shapes of
`tx.init` at the new ranks say which axes these are. `update` reads ranks off the state: it retraces once and goes on.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from optax_lowrank import checks
from optax_lowrank.low_rank import low_rank_states
from optax_lowrank.quantize import CodedState
from optax_lowrank.report import first_basis, used_columns
from optax_lowrank.rules import Asked
from optax_lowrank.sharding import fitting
from optax_lowrank.views import flatten_by_path


def resize(
    tx: optax.GradientTransformation, state: Any, params: Any, rank: int | Mapping[str, int]
) -> Any:
    """The state of an optimizer at other ranks: columns are cut off, or added and filled at the next refit.

    Every array whose shape depends on the rank follows: bases, moments, masses, histories, through `chain`,
    `partition`, `MultiSteps`, `inject_hyperparams` and `nnx.Optimizer`. New entries are what
    `tx.init` puts there. Arrays that do not depend on it are passed on, not copied. For use between steps, outside jit.

    Args:
      tx: the optimizer.
      state: its state. For planning, `jax.ShapeDtypeStruct`s do.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      rank: for every projected leaf, or by path as in `diagnostics` (leaves that are not named keep theirs), clipped to
        min(m, n) of the leaf. The matrices of a stacked leaf share it, and so do both sides of a two-sided
        projection. The rank that `tx` was made with is no limit. Two sides in 4 bits take even ranks, and what is new
        of a second moment begins at a sixteenth of the largest in its block.

    Returns:
      A state for `tx.update`, placed like the old one.

    Raises:
      TypeError, ValueError: `rank` is not a positive int, or names an unknown leaf; nothing is projected; `state` is
        not one of `tx`; an array has the rank mixed with something else in one axis.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx, params = ol.galore(0.01, rank=8), {"kernel": jnp.ones((32, 64))}
      >>> state = ol.resize(tx, tx.init(params), params, 4)
      >>> ol.memory_report(tx, params, state).arrays == 4 * (32 * 4 + 2 * 4 * 64)
      True
    """
    abstract_state(tx, params, state)  # raises where they do not belong together
    old = _ranks(state)
    if not old:
        raise ValueError(
            "`resize` finds no basis in `state`: this optimizer projects no leaf, or stores no basis."
        )
    ranks = old | _checked(rank, old)
    coded = _coded(_shapes(tx, params), _by_name(state))
    target = _shapes(tx, params, ranks, coded)
    _check_axes(state, target, old, _ranks(target))
    leaves, treedef = jax.tree.flatten(state)
    wanted = jax.tree.leaves(target)
    grows = [x.size < y.size for x, y in zip(leaves, wanted, strict=True)]
    starts = _initial_leaves(tx, params, ranks, coded, grows)
    return treedef.unflatten(map(_moved, leaves, wanted, starts))


def compact(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    headroom: int = 0,
    multiple_of: int = 8,
) -> Any:
    """Releases the columns that no matrix of a leaf uses: `resize` to the active ranks, never to larger ones.

    A leaf keeps the largest active rank of its matrices plus `headroom`, rounded up; a leaf that has no basis yet keeps
    all. Columns that go are zero, so the run continues as it would have, but for one thing: what is allocated is the
    cap of ranks to come. Leave `headroom` for ranks to rise, or `resize`. Moments that were not rotated may have rows
    left over from a larger rank; these go as well.

    Args:
      tx: the optimizer.
      state: its state, whose bases are read: for use between steps, outside jit.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      headroom: columns to keep beyond the active rank.
      multiple_of: ranks are rounded up to a multiple of it, since each new shape costs one compilation of the step.

    Returns:
      A state for `tx.update`; `state` itself where there is nothing to release.

    Raises:
      TypeError, ValueError: `headroom` or `multiple_of` is out of range; whatever `resize` raises.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.adarankgrad(0.01, rank=32, fit=ol.svd(), min_rank=1, rank_step=1)
      >>> params = {"kernel": jnp.outer(jnp.arange(64.0), jnp.arange(96.0))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> smaller = ol.compact(tx, state, params)
      >>> smaller.direction.inner_states["matrix"].inner_state.leaves["kernel"].basis.shape
      (1, 64, 8)
    """
    if headroom < 0 or multiple_of < 1:
        raise ValueError(
            f"`compact` needs headroom >= 0 and multiple_of >= 1, got {headroom=} and {multiple_of=}."
        )
    abstract_state(tx, params, state)  # raises where they do not belong together
    allocated, keep = _ranks(state), {}
    active = jax.device_get([_last_used_column(P) for _, P in _bases(state)])
    for (path, _), used in zip(_bases(state), active, strict=True):
        rounded = -(-(int(used) + headroom) // multiple_of) * multiple_of
        rank = min(rounded if used else allocated[path], allocated[path])
        keep[path] = max(rank, keep.get(path, rank))
    return state if keep == allocated else resize(tx, state, params, keep)


def abstract_state(tx: optax.GradientTransformation, params: Any, like: Any) -> Any:
    """Shapes of an optimizer state at the ranks of another one: what a checkpoint after `compact` is restored into.

    Args:
      tx: the optimizer.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      like: a state, or a checkpoint's own metadata of it: a tree of anything that has a `shape`, with the names of the
        state's fields and keys. `StandardCheckpointer().metadata(folder)` has such a tree, and `item_metadata(step)`
        of a `CheckpointManager(folder, item_handlers=StandardCheckpointHandler())` is one.

    Returns:
      The state that `tx.init(params)` would make, as `jax.ShapeDtypeStruct`s, with the ranks of `like`.

    Raises:
      TypeError, ValueError: `tx` is no transformation, or `like` no state of it.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol, orbax.checkpoint as ocp, tempfile
      >>> tx, params = ol.galore(0.01, rank=8), {"kernel": jnp.ones((32, 64))}
      >>> state = ol.resize(tx, tx.init(params), params, 4)
      >>> folder = tempfile.mkdtemp() + "/state"
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     checkpointer.save(folder, state)
      ...     checkpointer.wait_until_finished()
      ...     shapes = ol.abstract_state(tx, params, checkpointer.metadata(folder).item_metadata)
      ...     restored = checkpointer.restore(folder, shapes)
      >>> ol.diagnostics(restored)["kernel"].rank.tolist()
      [0]
    """
    checks.transformation("tx", tx, "It comes first, as in `compact(tx, state, params)`.")
    found = {name: tuple(x.shape) for name, x in _by_name(like).items() if hasattr(x, "shape")}
    ranks = {}
    usual = _shapes(tx, params)
    for name, path, P in _named_bases(usual):
        if found.get(name) not in (None, (), P.shape):
            ranks[path] = found[name][-1]
    state = _shapes(tx, params, ranks, _coded(usual, found))
    wanted = {name: x.shape for name, x in _by_name(state).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            there, here = (shapes.get(name, "missing") for shapes in (found, wanted))
            raise ValueError(
                f"this is no state of `tx` for these `params`: {name!r} is {there}, where `tx` has {here}. Give the "
                "optimizer, parameters and part of the checkpoint that belong together; a stack of states, as of "
                "`layerwise_step`, keeps its ranks."
            )
    return state


def _shapes(tx, params, ranks=MappingProxyType({}), coded=MappingProxyType({})):
    """Shapes of `tx.init(params)` at these ranks, with these arrays in codes; by path."""
    return jax.eval_shape(lambda params: tx.init(_asked(params, ranks, coded)), params)


def _asked(params, ranks, coded):
    leaves, treedef = flatten_by_path(params)
    for path in ranks.keys() | coded.keys():
        if path not in leaves:
            raise ValueError(
                f"`params` have no {path!r}, which the optimizer projects: what is around it, as `optax.lookahead`, "
                f"shows it another tree. They have {list(leaves)}; resize the state of the optimizer inside."
            )
        x = leaves[path]
        leaves[path] = Asked(x.shape, x.dtype, ranks.get(path), coded.get(path))
    return treedef.unflatten(leaves.values())


def _coded(usual, names) -> dict[str, frozenset[str]]:
    """Which arrays of each leaf are in codes, by the names of a state; another rank does not change that."""
    is_coded, found = lambda x: isinstance(x, CodedState), {}
    with_codes = {
        path
        for x in low_rank_states(usual)
        for path, leaf in x.leaves.items()
        if any(map(is_coded, jax.tree.leaves(leaf.rule, is_leaf=is_coded)))
    }
    for basis, path, _ in _named_bases(usual):
        if path in with_codes:
            rule = f"{basis[: basis.rindex('/basis')]}/rule/"
            inside = [name.removeprefix(rule) for name in names if name.startswith(rule)]
            split = [f"/{name}".partition("/block_scale/") for name in inside]
            inside = frozenset(array for _, is_scale, array in split if is_scale)
            found[path] = found.get(path, frozenset()) | inside
    return found


def _initial_leaves(tx, params, ranks, coded, chosen):
    """The chosen leaves of `tx.init(params)`, None for the others, of which none is allocated."""
    if not any(chosen):
        return [None] * len(chosen)

    def start():  # from zeros: what grows depends on shapes only
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        return jax.tree.leaves(tx.init(_asked(zeros, ranks, coded)))

    return jax.jit(lambda: [x if take else None for x, take in zip(start(), chosen, strict=True)])()


def _by_name(tree) -> dict[str, Any]:
    """Leaves by a name that a state, its boxed copy in an `nnx.Optimizer` and a checkpoint's metadata share."""
    # in metadata a box is a dict
    return {name.removesuffix("/value"): x for name, x in flatten_by_path(tree)[0].items()}


def _bases(state) -> list[tuple[str, Any]]:
    """Path of the leaf and array (b, ·, r) of every basis that is stored."""
    leaves = [leaf for x in low_rank_states(state) for leaf in x.leaves.items()]
    found = [(path, first_basis(leaf.basis)) for path, leaf in leaves]
    return [(path, P) for path, P in found if P is not None]


def _named_bases(state) -> list[tuple[str, str, Any]]:
    """The same, each with its name in the state."""
    names = {id(x): name for name, x in _by_name(state).items()}
    return [(names[id(P)], path, P) for path, P in _bases(state)]


def _ranks(state) -> dict[str, int]:
    ranks = {}
    for path, P in _bases(state):
        r = P.shape[2]
        if ranks.setdefault(path, r) != r:
            raise ValueError(
                f"{path!r} has two bases of different rank, {ranks[path]} and {r}: ranks are kept by path."
            )
    return ranks


def _checked(rank, old) -> dict[str, int]:
    asked: dict[str, Any] = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(old, rank)
    for path, r in asked.items():
        if path not in old:
            raise ValueError(f"`rank` names {path!r}, which has no basis. There are {sorted(old)}.")
        if isinstance(r, bool) or not hasattr(r, "__index__"):
            raise TypeError(f"`rank` must be an int or a dict of ints by path, got {rank!r}.")
        if r < 1:
            raise ValueError(f"`rank` must be positive, got {r} for {path!r}.")
    return asked


def _check_axes(state, target, old, new):
    """Cutting is right where each axis that changes is the rank of the leaf, or counts pairs or blocks along it."""
    for before, after in zip(low_rank_states(state), low_rank_states(target), strict=True):
        for path, leaf in before.leaves.items():
            names, wanted = _by_name(leaf), jax.tree.leaves(after.leaves[path])
            ranks = old.get(path), new.get(path)
            for (name, x), y in zip(names.items(), wanted, strict=True):
                changed = [(a, b) for a, b in zip(x.shape, y.shape, strict=False) if a != b]
                allowed = {ranks}
                if x.dtype == jnp.uint8:  # two 4-bit codes share a byte
                    allowed.add(tuple(r and r // 2 for r in ranks))
                if "/block_scale/" in name:  # the last axis counts blocks
                    allowed.add((x.shape[-1], y.shape[-1]))
                if x.ndim != y.ndim or x.dtype != y.dtype or not set(changed) <= allowed:
                    remedy = (
                        "a rule that keeps the axes of (r, n), or begin with a new state: `tx.init`"
                    )
                    if x.dtype != y.dtype:
                        remedy = "an even rank, as pairs of 4-bit codes share a byte"
                    raise ValueError(
                        f"{path}: {name!r} goes from shape {x.shape} to {y.shape} with the rank, so its entries change "
                        f"their meaning. Use {remedy}."
                    )


def _moved(x, y, start):
    """`x` in the shape of `y`: cut, or written over the beginning of `start`."""
    if x.shape == y.shape:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return y
    x = jnp.asarray(x)
    common = tuple(slice(min(sizes)) for sizes in zip(x.shape, y.shape, strict=True))

    def move(x, start):
        return x[common] if start is None else start.astype(x.dtype).at[common].set(x[common])

    sharding = fitting(x.sharding, y.shape)
    if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
        return jax.sharding.auto_axes(move, out_sharding=sharding)(x, start)
    out = move(x, start)
    return jax.device_put(out, sharding) if len(x.sharding.device_set) > 1 else out


def _last_used_column(P):
    """Number of the last column that a matrix of (b, ·, r) uses, from 1; 0 if there is none."""
    columns = jnp.arange(1, P.shape[2] + 1)
    return jnp.max(jnp.where(jnp.any(used_columns(P), axis=0), columns, 0))
