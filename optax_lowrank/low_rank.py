"""The core: low-rank projection as a frame with slots for ordinary Optax transformations.

    update = unfold(scale · P inner(PᵀG) + residual(G − P PᵀG))

| letter | meaning                                                              | shape     |
|--------|----------------------------------------------------------------------|-----------|
| `G`    | gradient of one leaf, folded to matrices, projected side first       | (b, m, n) |
| `P`    | basis: orthonormal columns, or zero columns beyond the active rank   | (b, m, r) |
| `R`    | coordinates PᵀG                                                      | (b, r, n) |
| `N`    | step in the subspace: what `inner` returns for `R`                   | (b, r, n) |
| `E`    | residual G − P R                                                     | (b, m, n) |
| `Q`    | rotation P_newᵀ P_old; exactly the identity where nothing was refit  | (b, r, r) |

`b` is the product of the batch axes: 1 for a plain kernel; layers, experts or heads otherwise.

What the parts need beyond their gradient reaches them through Optax's extra arguments, as dicts with the keys of the
gradient dict that the part gets, which are `<path of the leaf>/R`:

| name               | given to   | value for one leaf                                                   |
|--------------------|------------|----------------------------------------------------------------------|
| `rotation`         | `inner`    | `Q`                                                                  |
| `refreshed`        | `inner`    | () bool: was a basis of this leaf refit on this step?                |
| `column_rotation`  | `inner`    | in a nested `low_rank`: the outer `Q`, which acts on the columns     |
| `column_refreshed` | `inner`    | in a nested `low_rank`: the outer `refreshed`                        |
| `coords`           | `residual` | `R`                                                                  |
| `steps`            | `residual` | `N`                                                                  |
"""

import contextvars
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from optax_lowrank.bases import BasisStore, InDtype
from optax_lowrank.fits import Fit, randomized_svd
from optax_lowrank.refresh import (
    Policy,
    Statistics,
    every,
    initial_statistics,
    next_statistics,
    positions,
    refit,
)
from optax_lowrank.views import MatrixView, axes_by_path, flatten_by_path, owner

# Ranks by path in place of the configured one, set by `resize`. Only `init` looks: `update` goes by the state's shapes.
other_ranks: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar("other_ranks")


class LowRankState(NamedTuple):
    """State of `low_rank`: dicts by path, so that no wrapper mistakes a (b, m, r) array for a parameter's copy."""

    count: jax.Array  # () int32, updates so far
    basis: Any  # (b, m, r), as `basis_store` encodes it; changes on refresh
    stats: Statistics  # one entry a matrix, changes on every step
    inner: optax.OptState  # whatever `inner` keeps for R
    residual: optax.OptState  # whatever `residual` keeps for E


def low_rank(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    fit: Fit = randomized_svd(),  # noqa: B008
    refresh: Policy = every(200),  # noqa: B008
    residual: optax.GradientTransformation = optax.set_to_zero(),  # noqa: B008
    axes: Any = None,
    side: Literal["short", "long"] = "short",
    scale: jax.typing.ArrayLike = 1.0,
    seed: int = 0,
    basis_store: BasisStore = InDtype(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on the coordinates of the gradient in a low-rank basis, and `residual` on what is left.

    Where `refresh` says so, P ← fit(key, G, P). Then R = PᵀG, N = inner(R), S = residual(G − P R) and

        update = unfold(scale · P N + S).

    Every leaf needs a matrix view: use `assemble`, `optax.partition` or `optax.masked` where there are biases. A
    gradient that is zero or not finite never enters a basis: the old one stays, and the refit is tried again on the
    next good gradient. A matrix with an entry that is not finite is skipped: zero update, its state as before.

    `low_rank(low_rank(inner, rank=r, side="long"), rank=r)` projects both sides: moments are r × r.

    Args:
      inner: transformation of the coordinates, (b, r, n) a leaf, float32 or wider. As `params` it gets their
        `jax.ShapeDtypeStruct`s, as extra arguments what the table at the top of this module lists.
      rank: columns of the basis, clipped to min(m, n) of each leaf.
      fit: how a basis is chosen: `svd`, `randomized_svd`, `subspace_iteration`, `gaussian`, `adaptive_rank`.
      refresh: when: `every`, `on_convergence`, `on_staleness`, or any `(count, stats) -> due`.
      residual: transformation of G − P R, (b, m, n) a leaf; the default drops it, at no cost.
      axes: overrides of `matrix_axes`: which axes of which leaves make the matrix.
      side: "short" projects the shorter side, as the GaLore paper does; "long" the longer one, which makes the smaller
        state. A square matrix is projected on its reduction side.
      scale: multiplies the subspace step, not the residual.
      seed: of the random sketches, which differ between matrices and between refits.
      basis_store: how bases are stored: `InDtype(jnp.bfloat16)` halves them (orthonormal to 1e-2 then), `InCodes(8)`
        and `InCodes(4)` keep codes. They are fitted and used in the dtype of the coordinates, which is the default.

    Returns:
      A transformation. Updates have the gradient's shape and dtype; arithmetic is float32 or wider.

    Raises:
      TypeError, ValueError: `rank` or `side` is wrong (here); a leaf has no matrix view or is not real (`init`);
        `inner` computes with `params`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> state = ol.low_rank(optax.scale_by_adam(), rank=2).init({"kernel": jnp.ones((6, 8))})
      >>> state.basis["kernel"].shape, state.inner.mu["kernel/R"].shape
      ((1, 6, 2), (1, 2, 8))

    Reference: Zhao et al., arXiv:2403.03507, Definition 3.6. The slots, the residual and the nesting are ours.
    """
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(
            f"`rank` must be an int, got {rank!r}. Keep it static under `optax.inject_hyperparams`."
        )
    if rank < 1:
        raise ValueError(f"`rank` must be positive, got {rank}.")
    if side not in ("short", "long"):
        raise ValueError(f'`side` must be "short" or "long", got {side!r}.')
    inner, residual = optax.with_extra_args_support(inner), optax.with_extra_args_support(residual)

    def views_of(tree) -> tuple[dict[str, MatrixView], dict[str, Any], Any]:
        leaves, treedef = flatten_by_path(tree)
        found = axes_by_path(tree, axes, strict=False)
        return (
            {path: _view(path, leaf, found[path], side) for path, leaf in leaves.items()},
            leaves,
            treedef,
        )

    def init(params):
        views, leaves, _ = views_of(params)
        count = jnp.zeros([], jnp.int32)
        if not views:
            # no leaves: a partition without matrices, or `optax.tree_map_params`, which asks where copies of the
            # parameters are; scalars answer that there are none
            return LowRankState(count, *(jnp.zeros([]) for _ in range(4)))
        dtype = {path: jnp.promote_types(leaf.dtype, jnp.float32) for path, leaf in leaves.items()}
        others = other_ranks.get({})
        ranks = {path: min(others.get(path, rank), view.m, view.n) for path, view in views.items()}
        coords = {
            p: jax.ShapeDtypeStruct((v.batch, ranks[p], v.n), dtype[p]) for p, v in views.items()
        }
        rest = {p: jax.ShapeDtypeStruct((v.batch, v.m, v.n), dtype[p]) for p, v in views.items()}
        return LowRankState(
            count=count,
            basis={
                p: basis_store.encode(jnp.zeros((v.batch, v.m, ranks[p]), dtype[p]))
                for p, v in views.items()
            },
            stats=initial_statistics(sum(view.batch for view in views.values())),
            inner=_no_params(inner.init, _keyed(coords)),
            residual=residual.init(_keyed(rest)),
        )

    def update(updates, state, params=None, **extra):
        del params
        step_here = _with_automatic_sharding(step, updates, state)
        return step_here(updates, state, extra)

    def step(updates, state, extra):
        views, leaves, treedef = views_of(updates)
        if not views:
            return updates, state._replace(count=optax.safe_increment(state.count))
        _check_same_leaves(views, state)
        extra, outer_refreshed = _as_columns(extra)

        pending = state.stats.pending | refresh(state.count, state.stats)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        basis, Q, fitted, total = refit(fit, basis_store, key, leaves, views, state.basis, pending)
        P = {p: basis_store.decode(x, views[p].m, Q[p].dtype) for p, x in basis.items()}
        places = positions({path: view.batch for path, view in views.items()})
        refreshed = {path: jnp.any(fitted[place]) for path, place in places.items()}

        G = {path: view.fold(leaves[path]).astype(P[path].dtype) for path, view in views.items()}
        R = {path: jnp.matmul(P[path].mT, G[path]) for path in views}
        # whatever is not finite in G shows in R; a square that overflows would poison a second moment for good
        energy = _energy(R)
        finite = {path: jnp.isfinite(e) for path, e in energy.items()}
        R = {path: _where(finite[path], r) for path, r in R.items()}
        if outer_refreshed is not None:
            R = {
                p: jnp.where(refreshed[p] & outer_refreshed[p], _without_round_off(r), r)
                for p, r in R.items()
            }

        N, inner_state = _no_params(
            inner.update,
            _keyed(R),
            state.inner,
            _shapes(R),
            rotation=_keyed(Q),
            refreshed=_keyed(refreshed),
            **extra,
        )
        N = {path: N[f"{path}/R"] for path in views}
        # A step that overflows skips its matrix, too. And since the new state then waits for N, nothing reads the old
        # moments any more when they are overwritten: XLA copied them before.
        size = _energy(N)
        finite = {path: ok & jnp.isfinite(size[path]) for path, ok in finite.items()}
        N = {path: _where(finite[path], n) for path, n in N.items()}

        E = {
            path: _where(finite[path], G[path] - view.product(P[path], R[path]))
            for path, view in views.items()
        }
        S, residual_state = residual.update(
            _keyed(E), state.residual, _shapes(E), coords=_keyed(R), steps=_keyed(N), **extra
        )
        S = {path: _where(finite[path], S[f"{path}/R"]) for path in views}
        out = {
            path: view.product(P[path], scale * N[path]) + S[path] for path, view in views.items()
        }
        out = {
            path: view.unfold(out[path].astype(leaves[path].dtype)) for path, view in views.items()
        }

        energy = _per_matrix(energy, places)
        if getattr(refresh, "watches_captured", False):
            total = _per_matrix(_energy(G), places)
        return treedef.unflatten(out.values()), LowRankState(
            count=optax.safe_increment(state.count),
            basis=basis,
            stats=next_statistics(
                state.stats,
                state.count,
                pending,
                fitted,
                _per_matrix(finite, places),
                energy,
                total,
            ),
            inner=keep_where(finite, inner_state, state.inner),
            residual=keep_where(finite, residual_state, state.residual),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def keep_where(finite, new_state, old_state):
    """`new_state`, with the arrays of every matrix that is not `finite` as they were in `old_state`.

    Args:
      finite: dict by path of (b,) or () bools.
      new_state, old_state: states of any transformation; arrays are matched to leaves by path.
    """

    def pick(key_path, new, old):
        path = owner(key_path, finite)
        if path is None or new is old:
            return new
        ok = finite[path]
        if ok.ndim and new.shape[:1] != ok.shape:
            ok = jnp.all(ok)  # an array that is not kept per matrix
        return jnp.where(ok.reshape(ok.shape + (1,) * (new.ndim - ok.ndim)), new, old)

    return jax.tree_util.tree_map_with_path(pick, new_state, old_state)


def _view(path, leaf, axes, side) -> MatrixView:
    if axes is None:
        raise ValueError(
            f"`low_rank` has no matrix view for leaf {path!r} of shape {leaf.shape}. Give one through `axes`, or keep "
            "such leaves away from it: `optax_lowrank.assemble(..., dense=...)`, `optax.partition` or `optax.masked`."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"`low_rank` projects real floating-point leaves; leaf {path!r} is {leaf.dtype}."
        )
    return MatrixView.of(leaf.shape, axes, side)


def _keyed(by_path):
    return {f"{path}/R": value for path, value in by_path.items()}


def _shapes(by_path):
    return _keyed(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), by_path))


def _energy(x):
    return {
        path: jnp.sum(jnp.square(matrices), axis=(1, 2)).astype(jnp.float32)
        for path, matrices in x.items()
    }


def _per_matrix(by_path, places):
    return jnp.concatenate([by_path[path] for path in places])


def _where(finite, x):
    return jnp.where(finite[:, None, None], x, 0)


def _without_round_off(R):
    # after a refit on both sides R is diagonal up to round-off, which Adam would blow up to steps of ±1
    size = jnp.abs(R)
    return jnp.where(size > 1e-5 * jnp.max(size, axis=(1, 2), keepdims=True), R, 0)


def _as_columns(extra):
    """For a `low_rank` inside another: the outer rotation acts on the columns of this one's coordinates."""
    names = {"rotation": "column_rotation", "refreshed": "column_refreshed"}
    outer = {columns: _keyed(extra[rows]) for rows, columns in names.items() if rows in extra}
    return {k: v for k, v in extra.items() if k not in names} | outer, extra.get("refreshed")


def _check_same_leaves(views, state):
    if views.keys() != state.basis.keys():
        unknown, absent = (
            sorted(views.keys() - state.basis.keys()),
            sorted(state.basis.keys() - views.keys()),
        )
        raise ValueError(
            f"the gradients are not those `init` was called for: new are {unknown}, missing are {absent}. "
            "Call `init` with parameters of the same structure."
        )


def _no_params(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except (TypeError, AttributeError) as error:
        if "ShapeDtypeStruct" not in str(error):
            raise
        raise TypeError(
            "`inner` computes with `params`, but it sees projected gradients only; its `params` are their shapes. Put "
            "weight decay outside: `optax.chain(low_rank(...), optax.add_decayed_weights(...))`."
        ) from error


def _with_automatic_sharding(step, updates, state):
    """On a mesh with explicit axes, lets the compiler place what is between the arguments and results of `step`."""
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
    explicit = jax.sharding.AxisType.Explicit
    meshes = [s.mesh for s in jax.tree.leaves(shardings) if explicit in s.mesh.axis_types]
    if not meshes:
        return step
    # an array that was made outside of the mesh comes back replicated on it
    placed = lambda s: s if s.mesh.axis_types else NamedSharding(meshes[0], PartitionSpec())
    return jax.sharding.auto_axes(step, out_sharding=jax.tree.map(placed, shardings))
