"""Other ranks for a running optimizer: memory released or added between steps, and checkpoints of such states.

Inside jit the rank is a mask: columns of a basis beyond the active rank are zero, but allocated. Outside, `resize` and
`compact` cut or widen every array that has a rank for an axis, whichever transformation keeps it: the shapes of
`tx.init` at the new ranks say which axes these are. `update` reads ranks off the state: it retraces once and goes on.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.low_rank import LowRankState, other_ranks
from optax_lowrank.views import owner


def resize(
    tx: optax.GradientTransformation, state: Any, params: Any, rank: int | Mapping[str, int]
) -> Any:
    """The state of an optimizer at other ranks: columns are cut off, or added and filled at the next refit.

    Every array whose shape depends on the rank follows: bases, moments, masses, histories, through `chain`,
    `partition`, `MultiSteps`, `inject_hyperparams`, `nnx.Optimizer` and nested `low_rank`. New entries are what
    `tx.init` puts there. Arrays that do not depend on it are passed on, not copied. For use between steps, outside jit.

    Args:
      tx: the optimizer.
      state: its state. For planning, `jax.ShapeDtypeStruct`s do.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      rank: for every projected leaf, or by path as in `diagnostics` (leaves that are not named keep theirs), clipped to
        min(m, n) of the leaf. The matrices of a stacked leaf share it. Of a two-sided projection an int is both ranks;
        a dict names the inner one `<path>/R`. The rank that `tx` was made with is no limit.

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
    old = _ranks(abstract_state(tx, params, state))
    if not old:
        raise ValueError("`resize` finds no basis in `state`: this optimizer projects no leaf.")
    ranks = old | _checked(rank, old)
    target = _shapes(tx, params, ranks)
    new = _ranks(target)  # those asked for, clipped
    keyed, treedef = jax.tree_util.tree_flatten_with_path(state)
    wanted = jax.tree.leaves(target)
    for (key_path, x), y in zip(keyed, wanted, strict=True):
        _check_axes(key_path, x, y, old, new)
    grows = [x.size < y.size for (_, x), y in zip(keyed, wanted, strict=True)]
    starts = iter(_initial_leaves(tx, params, ranks, grows))
    return treedef.unflatten(
        _moved(x, y, next(starts) if more else None)
        for (_, x), y, more in zip(keyed, wanted, grows, strict=True)
    )


def compact(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    headroom: int = 0,
    multiple_of: int = 8,
) -> Any:
    """Releases the columns that no matrix of a leaf uses: `resize` to the active ranks, never to larger ones.

    A leaf keeps the largest active rank of its matrices plus `headroom`, rounded up; a leaf that has no basis yet keeps
    all, and so do the coordinates that a nested `low_rank` still uses. Columns that go are zero, so the run continues
    as it would have, but for one thing: what is allocated is the cap of ranks to come. Leave `headroom` for ranks to
    rise, or `resize`. Moments that were not rotated may have rows left over from a larger rank; these go as well.

    Args:
      tx: the optimizer.
      state: its state, whose bases are read: for use between steps, outside jit.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      headroom: columns to keep beyond the active rank.
      multiple_of: ranks are rounded up to a multiple of it, since each new shape costs one compilation of the step.

    Returns:
      A state for `tx.update`; `state` itself where there is nothing to release.

    Raises:
      ValueError: `headroom` or `multiple_of` is out of range; whatever `resize` raises.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.adarankgrad(0.01, rank=32, fit=ol.svd(), min_rank=1, rank_step=1)
      >>> params = {"kernel": jnp.outer(jnp.arange(64.0), jnp.arange(96.0))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> smaller = ol.compact(tx, state, params)
      >>> smaller[0].inner_states["matrix"].inner_state.basis["kernel"].shape
      (1, 64, 8)
    """
    if headroom < 0 or multiple_of < 1:
        raise ValueError(
            f"`compact` needs headroom >= 0 and multiple_of >= 1, got {headroom=} and {multiple_of=}."
        )
    bases = list(_bases(state).values())
    active = jax.device_get([_last_used_column(P) for _, P in bases])
    keep: dict[str, int] = {}
    for (path, P), used in zip(bases, active, strict=True):
        rounded = -(-(int(used) + headroom) // multiple_of) * multiple_of
        keep[path] = max(keep.get(path, 0), min(rounded, P.shape[2]) if used else P.shape[2])
    for path in sorted(keep, key=len, reverse=True):
        keep[path] = max(keep[path], keep.get(f"{path}/R", 0))
    allocated = _ranks(state)
    keep = {path: min(rank, allocated[path]) for path, rank in keep.items()}
    return state if keep == allocated else resize(tx, state, params, keep)


def abstract_state(tx: optax.GradientTransformation, params: Any, like: Any) -> Any:
    """Shapes of an optimizer state at the ranks of another one: what a checkpoint after `compact` is restored into.

    Args:
      tx: the optimizer.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      like: a state, or a checkpoint's own metadata of it: a tree of anything that has a `shape`, with the names of the
        state's fields and keys. `CheckpointManager.item_metadata(step)` and `StandardCheckpointer().metadata(folder)`
        are such trees.

    Returns:
      The state that `tx.init(params)` would make, as `jax.ShapeDtypeStruct`s, with the ranks of `like`.

    Raises:
      ValueError: `like` is no state of `tx`.

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
    found = {name: tuple(x.shape) for name, x in _by_name(like).items() if hasattr(x, "shape")}
    configured = _bases(_shapes(tx, params, {}))
    ranks = {
        path: found[name][-1]
        for name, (path, P) in configured.items()
        if found.get(name) not in (None, (), P.shape)
    }
    state = _shapes(tx, params, ranks)
    wanted = {name: x.shape for name, x in _by_name(state).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            there, here = (shapes.get(name, "missing") for shapes in (found, wanted))
            raise ValueError(
                f"this is no state of `tx` for these `params`: {name!r} is {there}, where `tx` has {here}. Give the "
                "optimizer, parameters and part of the checkpoint that belong together."
            )
    return state


@contextlib.contextmanager
def _init_at(ranks: Mapping[str, int]) -> Iterator[None]:
    token = other_ranks.set(ranks)
    try:
        yield
    finally:
        other_ranks.reset(token)


def _shapes(tx, params, ranks):
    with _init_at(ranks):
        # a new function, because traces are cached by function
        return jax.eval_shape(lambda p: tx.init(p), params)


def _initial_leaves(tx, params, ranks, chosen):
    """The chosen leaves of `tx.init(params)`; none of the others is allocated."""
    if not any(chosen):
        return []
    with _init_at(ranks):
        return jax.jit(
            lambda: [
                x for x, take in zip(jax.tree.leaves(tx.init(params)), chosen, strict=True) if take
            ]
        )()


def _by_name(tree) -> dict[str, Any]:
    """Leaves by a name that a state, its boxed copy in an `nnx.Optimizer` and a checkpoint's metadata share."""
    name = lambda key_path: jax.tree_util.keystr(key_path, simple=True, separator="/")
    return {
        name(key_path).removesuffix("/value"): x
        for key_path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _bases(tree, prefix="") -> dict[str, tuple[str, Any]]:
    """Path of the leaf and array (b, ·, r) of each basis, by name."""
    found = {}
    is_one = lambda x: isinstance(x, LowRankState)
    for key_path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one):
        if is_one(x):
            keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
            at = prefix + "".join(f"{key}/" for key in keys)
            if isinstance(x.basis, Mapping):  # otherwise it has no leaves
                for path, P in x.basis.items():
                    # the last array: of a basis in codes the scales, with the same columns
                    name, array = list(_by_name(P).items())[-1]
                    name = f"{at}basis/{path}/{name}".removesuffix("/value")  # nnx boxes arrays
                    found[name.removesuffix("/")] = path, array
            found |= _bases(x.inner, f"{at}inner/") | _bases(x.residual, f"{at}residual/")
    return found


def _ranks(state) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for path, P in _bases(state).values():
        if ranks.setdefault(path, P.shape[2]) != P.shape[2]:
            raise ValueError(
                f"leaf {path!r} has two bases of different rank, {ranks[path]} and {P.shape[2]}: a path cannot tell "
                "them apart. Give them equal ranks."
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


def _check_axes(key_path, x, y, old, new):
    """Cutting is right where each axis that changes is a rank of the leaf or of a projection around it."""
    if x.shape == y.shape:
        return
    path = owner(key_path, old) or ""
    ours = [q for q in old if path == q or path.startswith(f"{q}/R")]
    allowed = {(old[q], new[q]) for q in ours}
    changed = {(a, b) for a, b in zip(x.shape, y.shape, strict=False) if a != b}
    if x.ndim != y.ndim or not changed <= allowed:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        raise ValueError(
            f"{name!r} goes from shape {x.shape} to {y.shape} with the ranks, so its entries change their meaning. "
            "Use a transformation that keeps the axes of (b, r, n), or begin with a new state: `tx.init`."
        )


def _moved(x, y, start):
    """`x` in the shape of `y`: cut, or written over the beginning of `start`."""
    if x.shape == y.shape:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return y
    x = jnp.asarray(x)
    common = tuple(slice(min(sizes)) for sizes in zip(x.shape, y.shape, strict=True))
    out = x[common] if start is None else start.astype(x.dtype).at[common].set(x[common])
    return jax.device_put(out, x.sharding) if len(x.sharding.device_set) > 1 else out


def _last_used_column(P):
    """Number of the last column that is not zero in all of (b, m, r), from 1; 0 if there is none."""
    columns = jnp.arange(1, P.shape[2] + 1)
    return jnp.max(jnp.where(jnp.any(P != 0, axis=(0, 1)), columns, 0))
