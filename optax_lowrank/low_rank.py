"""The core: a step of a low-rank method is a step A of the coordinates and a weight for each column of the gradient.

    U = unfold(α P A + G diag(c))

| letter | meaning, for ONE matrix                                                        | shape   |
|--------|--------------------------------------------------------------------------------|---------|
| `G`    | gradient, projected side first                                                 | (m, n)  |
| `P`    | basis: orthonormal columns, or zero columns beyond the active rank             | (m, r)  |
| `R`    | coordinates PᵀG                                                                | (r, n)  |
| `A`    | step of the coordinates: what the rule makes of R                              | (r, n)  |
| `c`    | weight of each column of G                                                     | (n,)    |
| `Q`    | rotation P_newᵀ P_old at a refit                                               | (r, r)  |

Two-sided (`side="both"`), a second basis K (n, r) of the other side is fitted to R; coordinates are Pᵀ G K, the lift
is P A Kᵀ.

A leaf is a stack of b such matrices. Leaves meet at a refit only, where those of one shape share a program; then they
are updated one after the other, so that what a step needs in between is one leaf's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.bases import Basis, BasisStore, Fitted, InDtype
from optax_lowrank.classify import Rank, check_rank, ranks_by_path, views_by_path
from optax_lowrank.fits import Fit, check_fit, randomized_svd
from optax_lowrank.refit import Leaf, Matrix, Setup, TwoSided, read_bases, refit, seeds_of
from optax_lowrank.refresh import (
    Policy,
    Statistics,
    as_policy,
    every,
    initial_statistics,
    next_statistics,
    positions,
)
from optax_lowrank.rules import Asked, Rule, as_rule, put_back, repeated, unturned, wide
from optax_lowrank.views import flatten_by_path
from optax_lowrank.walls import AxisName, after, automatic, mean_over, vary_alike

Side = Literal["short", "long", "both"]


class Geometry(NamedTuple):
    """What happens to one matrix in full space: how it is parametrized, or how its step is measured.

    Args:
      init: `(W, axis) -> state`, for the `jax.ShapeDtypeStruct` of weights (m, n); `axis` is the one that the layer
        sums over.
      tangent: `(G, W, axis) -> (gradient, kept)`: what is projected and fitted in place of G, and what `retract` gets
        of it. Here and in `retract` a matrix has its axes as the leaf holds them, (m, n) or (n, m), since a sum along
        the other order would lay it out anew.
      retract: `(U, W, kept, state, *, axis, count, **extra) -> (update, state)`: from the lifted step in the gradient's
        dtype to the update.
      reads_weights: whether `tangent` and `retract` want W.
    """

    init: Callable[..., Any]
    tangent: Callable[..., Any] | None
    retract: Callable[..., Any]
    reads_weights: bool


class LowRankState(NamedTuple):
    """State of `low_rank`."""

    count: jax.Array  # () int32, updates so far
    stats: Statistics  # one entry a matrix, changes on every step
    leaves: Any  # dict of `Leaf` by path


# no geometry: steps are taken as they are
_FLAT = Geometry(
    init=lambda W, axis: (),
    tangent=None,
    retract=lambda U, W, kept, state, **_: (U, state),
    reads_weights=False,
)


def low_rank_states(state: Any) -> list[LowRankState]:
    """Every `LowRankState` with leaves in a tree."""
    is_one = lambda x: isinstance(x, LowRankState)
    found = filter(is_one, jax.tree.leaves(state, is_leaf=is_one))
    return [x for x in found if isinstance(x.leaves, dict)]


def low_rank(
    rule: Rule | optax.GradientTransformation,
    *,
    rank: Rank,
    fit: Fit | Basis | None = None,
    refresh: Policy = every(200),  # noqa: B008
    axes: Any = None,
    side: Side = "short",
    scale: jax.typing.ArrayLike = 1.0,
    seed: int = 0,
    basis_store: BasisStore = InDtype(),  # noqa: B008
    geometry: Geometry | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs a rule, or any Optax transformation, on the coordinates of each matrix's gradient in a low-rank basis.

    Where `refresh` says so, P ← fit(key, G, P). Then R = PᵀG, (A, c) = rule(R, ‖G_j‖²), and

        update = unfold(scale · P A + G diag(c)).

    Every leaf needs a matrix view: use `assemble`, `optax.partition` or `optax.masked` where there are biases. A
    basis is only ever replaced by an orthonormal one: where a gradient is zero or not finite, the old one stays, and
    the refit is tried again on the next gradient. A matrix whose gradient or step is not finite (or overflows in a
    square) is skipped: zero update, its state as before. What happens to a leaf depends neither on its name nor on
    other leaves, but for random sketches, which differ by path, and staggered refreshes.

    Args:
      rule: a `Rule`, or a transformation, which sees the (r, n) coordinates of one matrix, float32 or wider, and as
        `params` only their shape. Optax's extra arguments are passed on.
      rank: columns of the basis, an int; a share of the projected side in (0, 1), rounded to a multiple of 8; or a dict
        {regex: int or share} by path, 128 where nothing matches. Clipped to min(m, n) of each leaf.
      fit: how a basis is chosen: `randomized_svd()` (default), `svd()`, `subspace_iteration()`, `gaussian()`,
        `adaptive_rank(...)`; or `seeded()`, `dct()`, which store next to nothing.
      refresh: when: `every`, `on_convergence`, `on_staleness`, or any `(count, stats) -> due`.
      axes: overrides of `matrix_axes`: which axes of which leaves make the matrix.
      side: "short" projects the shorter side, as the GaLore paper does; "long" the longer one, which makes the smaller
        state; "both" both, with moments of r × r. A square matrix is projected on its reduction side.
      scale: α, multiplies the step of the coordinates only.
      seed: of the random sketches, which differ between matrices and between refits.
      basis_store: how fitted bases are stored: `InDtype(jnp.bfloat16)` halves them (orthonormal to 1e-2 then),
        `InCodes(8)` and `InCodes(4)` keep codes. They are fitted in float32 or wider, which is the default.
      geometry: what else happens to a matrix in full space, see `Geometry`.
      axis_name: inside `jax.shard_map`, the mesh axes along which gradients differ. The update is that of their mean,
        but what is averaged is R, r · n numbers a matrix, and at a refit the products of the fit, r + 8 columns or
        rows at a time. ‖G‖² is the mean of the devices' own, which is larger than that of their mean: by it
        `adaptive_rank` keeps more columns, and `on_staleness` refits sooner. A rule that weighs columns, and a fit
        that does not set `by_products`, have the whole gradient averaged.

    Returns:
      A transformation. Updates have the gradient's shape and dtype. Arithmetic is float32 or wider; of bfloat16
      gradients the products with P take bfloat16 operands and accumulate in float32.

    Raises:
      TypeError, ValueError: `rank`, `side`, `fit`, `refresh` or `rule` is wrong (here); a leaf has no matrix view or
        is not real (`init`); the gradients are not those `init` was called for; `params` are missing.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> state = ol.low_rank(optax.scale_by_adam(), rank=2).init({"kernel": jnp.ones((6, 8))})
      >>> leaf = state.leaves["kernel"]
      >>> leaf.basis.shape, leaf.rule.mu.shape
      ((1, 6, 2), (1, 2, 8))

    Reference: Zhao et al., arXiv:2403.03507, Definition 3.6. The weights c, which hold Fira and APOLLO as well, are
      ours.
    """
    check_rank(rank)
    checks.number("scale", scale)
    checks.integer("seed", seed)
    if side not in get_args(Side):
        raise ValueError(f'`side` must be "short", "long" or "both", got {side!r}.')
    rule, fit = as_rule(rule), randomized_svd() if fit is None else check_fit(fit)
    geometry = _FLAT if geometry is None else geometry
    setup = Setup(
        basis=fit if hasattr(fit, "implicit") else Fitted(fit, basis_store),
        two_sided=side == "both",
        turn=None if rule.turn is unturned else rule.turn,
        axis_name=axis_name,
        recall=rule.recall,
        tangent=geometry.tangent,
    )
    core = _Core(rule, rank, setup, as_policy(refresh), axes, side, scale, seed, geometry)
    return optax.GradientTransformationExtraArgs(core.init, automatic(core.update))


@dataclasses.dataclass(frozen=True, eq=False)
class _Core:
    """`low_rank` from the whole tree down to one matrix."""

    rule: Rule
    rank: Rank
    setup: Setup
    refresh: Policy
    axes: Any
    side: Side
    scale: jax.typing.ArrayLike
    seed: int
    geometry: Geometry

    # ------------------------------------------------------------------------------------------------------ the tree

    def init(self, params):
        checks.arrays(params)
        views, leaves, _ = self.views_of(params)
        count = jnp.zeros([], jnp.int32)
        if not views:
            # no leaves: a partition without matrices, or `optax.tree_map_params`, which asks where copies of the
            # parameters are; scalars answer that there are none
            return LowRankState(count, jnp.zeros([]), jnp.zeros([]))
        ranks = ranks_by_path(views, self.rank, strict=False)

        def start(path, leaf):
            # `resize` asks for other ranks by shapes that know one
            rank = getattr(leaf, "rank", None) or ranks[path]
            rank = min(rank, views[path].m, views[path].n)
            return self.start(views[path], rank, wide(leaf), getattr(leaf, "coded", None))

        return LowRankState(
            count,
            initial_statistics(sum(view.batch for view in views.values())),
            {path: start(path, leaf) for path, leaf in leaves.items()},
        )

    def update(self, updates, state, params=None, **extra):
        checks.state(state, LowRankState)
        checks.alike(updates, params)
        if not self.geometry.reads_weights:
            return self.step(updates, state, None, **extra)
        checks.weights("this optimizer", params)
        return self.step(updates, state, params, **extra)

    def step(self, updates, state, params, **extra):
        views, grads, treedef = self.views_of(updates)
        if not views:
            return updates, state._replace(count=optax.safe_increment(state.count))
        _check_same_leaves(views, state)
        places = positions({path: view.batch for path, view in views.items()})
        matrices = self.matrices(views, grads, state, params, places)
        matrices, stats, count = vary_alike(
            matrices, state.stats, state.count, but=self.setup.axis_name
        )
        told, first = {**extra, "count": count}, next(iter(matrices.values()))
        if self.setup.axis_name is not None and self.weighs_columns(first, told):
            updates = mean_over(self.setup.axis_name, updates)
            alone = dataclasses.replace(self, setup=self.setup._replace(axis_name=None))
            return alone.step(updates, state, params, **extra)
        # `optax.contrib.sam` interpolates states, which makes ints of bools
        pending = stats.pending.astype(bool) | self.refresh(count, stats)
        new = refit(self.setup, count, matrices, pending, places)

        update_leaf = functools.partial(self.update_leaf, told)
        if isinstance(count, jax.core.Tracer):
            update_leaf = jax.jit(update_leaf)  # traced once for leaves that are alike
        out, leaves, numbers, before = {}, {}, {}, None
        for path, matrix in matrices.items():
            with checks.noted(_note(path, matrix.view)):
                updated = update_leaf(matrix, *new.leaves[path], before)
            out[path], leaves[path], numbers[path], before = updated
        in_order = (numbers[path] for path in places)
        energy, total, finite = map(jnp.concatenate, zip(*in_order, strict=True))
        if not getattr(self.refresh, "watches_captured", False):
            total = new.energy
        stats = next_statistics(stats, count, pending, new.fitted, finite, energy, total)
        # the count before it was made to vary is the same on all devices
        count = optax.safe_increment(state.count)
        return treedef.unflatten(out.values()), LowRankState(count, stats, leaves)

    def weighs_columns(self, x: Matrix, told):
        """Whether the rule weighs columns of the gradient, which takes the whole of it."""
        n, told = x.rank if self.setup.two_sided else x.view.n, {**told, "size": x.view.m}

        def step(state):
            R, columns = jnp.zeros((x.rank, n), wide(x.gradient)), jnp.zeros(n)
            return self.rule.step(R, columns, state, finite=jnp.bool_(True), **told)

        _, c, _ = jax.eval_shape(jax.vmap(step, axis_size=x.view.batch), x.leaf.rule)
        return c is not None

    def views_of(self, tree):
        leaves, treedef, views = views_by_path(tree, self.axes, self.side)
        for path, leaf in leaves.items():
            _check_leaf(path, leaf, views[path])
        return views, leaves, treedef

    def matrices(self, views, grads, state, params, places) -> dict[str, Matrix]:
        """What the update knows of each leaf before the refresh."""
        weights = {} if params is None else flatten_by_path(params)[0]
        ranks = ranks_by_path(views, self.rank, strict=False)

        def matrix(path, view):
            leaf = state.leaves[path]
            arrays = jax.tree.leaves(leaf.basis)
            rank = arrays[-1].shape[-1] if arrays else ranks[path]  # `resize` may have changed it
            want = jax.eval_shape(lambda: self.bases(view, rank, wide(grads[path])))
            there, here = ([x.shape for x in jax.tree.leaves(y)] for y in (leaf.basis, want))
            if there != here:
                raise ValueError(f"bases are {there}, and should be {here}. {_note(path, view)}")
            last_fit = state.stats.last_fit[places[path]]
            seeds = seeds_of(self.seed, path, view.batch)
            return Matrix(view, rank, seeds, grads[path], weights.get(path), leaf, last_fit)

        return {path: matrix(path, view) for path, view in views.items()}

    # ------------------------------------------------------------------------------------------- one leaf, a stack

    def start(self, view, r, dtype, coded=None) -> Leaf:
        """The state of one leaf before the first step; `coded` of `Asked`."""
        shape = r, r if self.setup.two_sided else view.n
        R = jnp.zeros(shape, dtype) if coded is None else Asked(shape, dtype, r, coded)
        outer = self.geometry.init(jax.ShapeDtypeStruct((view.m, view.n), dtype), view.sum_axis)
        states = (repeated(state, view.batch) for state in (self.rule.init(R), outer))
        return Leaf(self.bases(view, r, dtype), *states)

    def bases(self, view, r, dtype):
        """What is stored of the bases of one leaf before the first step."""
        stack = lambda size: repeated(self.setup.basis.init(size, r, dtype), view.batch)
        return TwoSided(stack(view.m), stack(view.n)) if self.setup.two_sided else stack(view.m)

    def update_leaf(self, told, x: Matrix, stored, rule, fitted, before):
        """The update of one leaf in the bases of this step, its new state, numbers, and what the next leaf waits for.

        Args:
          told: what rules are told besides.
          x: the leaf before the refresh.
          stored, rule, fitted: of this refresh, the rule's state in the coordinates of the new bases.
          before: update and state of the leaf before, for which this one waits, or None.
        """
        fold = lambda leaf: None if leaf is None else x.view.fold(leaf)

        # folds, and hands on the rule's state, or those of all leaves would be folded and decoded first
        def project(gradient, weight, rule, *others):
            G, W = fold(gradient), fold(weight)
            return jax.vmap(functools.partial(self.project, x, told))(G, W, *others), W, rule

        last_fit = jnp.where(fitted, told["count"], x.last_fit)
        others = stored, x.seeds, last_fit, fitted
        projected, W, rule = after(before, project, x.gradient, x.weight, rule, *others)
        finish, G = jax.vmap(functools.partial(self.finish, x, told)), fold(x.gradient)
        U, rule, geometry, (awaited, instead), *numbers = finish(
            G, W, projected, rule, x.leaf.geometry
        )
        before = x.view.unfold(awaited), instead
        return x.view.unfold(U), Leaf(stored, rule, geometry), numbers, before

    # ---------------------------------------------------------------------------------------------------- one matrix

    def project(self, x: Matrix, told, G, W, stored, seeds, last_fit, fitted):
        """R = PᵀG, or PᵀGK; P as products take it, K or None; ‖G_j‖², (n,) float32; and what the geometry keeps."""
        P, K = read_bases(self.setup, x, stored, seeds, last_fit)
        G, kept = self.tangent(x, G, W)
        if G.dtype == jnp.bfloat16:
            P = P.astype(G.dtype)
        R = jnp.matmul(P.T, G.astype(P.dtype), preferred_element_type=wide(G))
        R = R if K is None else jnp.matmul(R, K)
        R, kept = mean_over(self.setup.axis_name, (R, kept))
        kinds = {y.dtype for y in jax.tree.leaves(stored)}
        if K is not None:
            # int32: the numbers of a DCT's columns
            exact = kinds | {G.dtype} <= {R.dtype, jnp.dtype("int32")}
            R = jnp.where(fitted, _without_round_off(R, 1e-5 if exact else 2**-6), R)
        # as the leaf lies in memory: of squares that are transposed, XLA for CPUs makes an array
        squares = jnp.square(x.view.in_memory(G).astype(R.dtype))
        columns = jnp.sum(squares, axis=int(x.view.flipped)).astype(jnp.float32)
        columns = mean_over(self.setup.axis_name, columns)
        floats = {kind for kind in kinds | {P.dtype} if jnp.issubdtype(kind, jnp.floating)}
        if floats != {R.dtype} and self.weighs_columns(x, told):
            # now, as it makes arrays of R's size, which would else lie beside those of the rule
            R, columns = jax.lax.optimization_barrier((R, columns + _overlap(P, R)))
        return R, P, K, columns, kept

    def finish(self, x: Matrix, told, G, W, projected, old, outer):
        """U = α P A + G diag(c) and the new states; zero and the old ones where something is not finite."""
        R, P, K, columns, kept = projected
        told, dtype = {**told, "size": x.view.m}, wide(G)
        # whatever is not finite in G shows in R; a square that overflows would poison a second moment for good
        energy = _energy(R)
        finite = jnp.isfinite(energy) & _finite(kept)
        A, c, new = self.rule.step(jnp.where(finite, R, 0), columns, old, finite=finite, **told)
        finite &= _finite((A, c))
        # from here on as the leaf lies in memory: of a product transposed at once, XLA for CPUs swaps the factors, and
        # has to move all of it
        of, axis = x.view.in_memory, x.view.sum_axis_in_memory
        U = jnp.zeros_like(of(G))
        if A is not None:
            A = jnp.asarray(self.scale, dtype) * (A if K is None else jnp.matmul(A, K.T))
            # an A of the state alone would not wait for this leaf's turn, as R does
            A = jnp.where(finite, A, 0)
            U = x.view.product(P, A.astype(P.dtype)).astype(G.dtype)
        if c is not None:
            if self.setup.two_sided:
                raise ValueError('a rule that weighs columns needs `side="short"` or "long".')
            T, _ = self.tangent(x, G, W)
            U = (U.astype(dtype) + of(T).astype(dtype) * of(c.astype(dtype)[None])).astype(G.dtype)
        lifted = U
        U, new_outer = self.geometry.retract(U, of(W), kept, outer, axis=axis, **told)
        U = jnp.where(finite, U.astype(G.dtype), 0)
        new, new_outer = self.rule.keep(finite, new, old), put_back(finite, new_outer, outer)
        # To look at an update, XLA for CPUs computes it once more, and copies the weights that it reads, as they are
        # overwritten by then.
        awaited = lifted if self.geometry.reads_weights else U
        # XLA for TPUs needs less if the new state is looked at in its place, but a GiB more in a training step of 1B
        # where the update has both terms, as Fira's has.
        instead = () if A is not None and c is not None else new
        return of(U), new, new_outer, (of(awaited), instead), energy, jnp.sum(columns), finite

    def tangent(self, x, G, W):
        if self.setup.tangent is None:
            return G, None
        of = x.view.in_memory
        T, kept = self.setup.tangent(of(G), of(W), x.view.sum_axis_in_memory)
        return of(T), kept


def _energy(x):
    return jnp.sum(jnp.square(x)).astype(jnp.float32)


def _finite(tree):
    finite = jnp.bool_(True)
    for x in jax.tree.leaves(tree):
        finite &= jnp.isfinite(_energy(x))
    return finite


def _overlap(P, R):
    """What ‖G_j‖² lacks for ‖E_j‖² = ‖G_j‖² − ‖R_j‖², with E = G − P R, where a narrow P is not quite orthonormal."""
    C = jnp.matmul(P.T, P, preferred_element_type=R.dtype)
    return jnp.sum(R * (jnp.matmul(C, R) - R), axis=0).astype(jnp.float32)


def _without_round_off(R, unit):
    # after a refit on both sides R is diagonal up to round-off, which Adam would blow up to steps of ±1;
    # gradients and bases in bfloat16 or codes make it a percent
    size = jnp.abs(R)
    return jnp.where(size > unit * jnp.max(size), R, 0)


def _check_leaf(path, leaf, view):
    if view is None:
        raise ValueError(
            f"`low_rank` has no matrix view for leaf {path!r} of shape {leaf.shape}. Give one through `axes`, or keep "
            "such leaves away from it: `optax_lowrank.assemble(..., dense=...)`, `optax.partition` or `optax.masked`."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"`low_rank` projects real floating-point leaves; leaf {path!r} is {leaf.dtype}."
        )


def _note(path, view):
    return (
        f"It is leaf {path!r} of shape {view.shape}. Gradients and state must be of the parameters that `init` was "
        "called for; a state from after `compact` is restored into `abstract_state(tx, params, metadata)`."
    )


def _check_same_leaves(views, state):
    if views.keys() != state.leaves.keys():
        unknown = sorted(views.keys() - state.leaves.keys())
        absent = sorted(state.leaves.keys() - views.keys())
        raise ValueError(
            f"the gradients are not those `init` was called for: new are {unknown}, missing are {absent}. "
            "Call `init` with parameters of the same structure."
        )
