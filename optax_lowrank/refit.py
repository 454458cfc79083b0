"""How bases are refit and states turned with them: one compiled program a size of basis, one matrix after the other.

Compile time does not grow with the number of layers, and never more than one matrix is copied out of its leaf. Narrow
matrices share the program of wider ones where that can be, see `_alike`: of them what is thin is filled up with zeros,
n × (r + 8) at most. The question "refit now?" is only ever looked at as a scalar inside a loop: a batched predicate
would turn `lax.cond` into a select that factorizes every matrix on every step.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_lowrank.bases import Basis
from optax_lowrank.linalg import LinearOperator, matmul, times
from optax_lowrank.refresh import positions
from optax_lowrank.rules import Turn, wide
from optax_lowrank.views import MatrixView
from optax_lowrank.walls import AxisName, cond, entry, for_each, mean_over, put, put_in, unmoved


class Setup(NamedTuple):
    """What the refits of a run have in common; hashable."""

    basis: Basis
    two_sided: bool
    turn: Callable[[Any, Turn], Any] | None  # of the rule, if it looks at the basis
    axis_name: AxisName  # mesh axes along which gradients differ
    recall: Callable[[Any], jax.Array] | None  # of the rule
    tangent: Callable[..., Any] | None  # of the geometry


class TwoSided(NamedTuple):
    """The bases of both sides as stored."""

    P: Any
    K: Any


class Leaf(NamedTuple):
    """State of one leaf, a stack of b matrices."""

    basis: Any  # (b, m, r) as stored, on two sides `TwoSided`; changes on refresh
    rule: Any  # (b, ...), the rule's state
    geometry: Any = ()  # (b, ...), the geometry's state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """What an update knows of one leaf, a stack of b matrices."""

    view: MatrixView = dataclasses.field(metadata={"static": True})
    rank: int = dataclasses.field(metadata={"static": True})
    seeds: jax.Array  # (b, 2) uint32, see `seeds_of`
    gradient: jax.Array  # in the leaf's shape
    weight: jax.Array | None  # the same, where it is wanted
    leaf: Leaf
    last_fit: jax.Array  # (b,) int32


class Refit(NamedTuple):
    """Outcome of the refresh of one step."""

    leaves: Any  # (b, ...), of each leaf its basis and the rule's state in it; `refit` adds the leaf's `fitted`
    fitted: jax.Array  # (k,) bool
    energy: jax.Array  # (k,) float32, ‖G‖² where fitted


def read_bases(setup: Setup, x: Matrix, stored: Any, seeds: jax.Array, last_fit: jax.Array):
    """The bases (P, K) of one matrix of a leaf as they are used, zeros before the first fit; K is None on one side."""
    key, dtype = _key(seeds, last_fit), wide(x.gradient)

    def read(stored, key, size):
        P = setup.basis.read(stored, key, size, x.rank, dtype)
        if not setup.basis.implicit:
            return P
        # made once, or XLA for TPUs would make it anew in each product; and nothing before the first fit
        return lax.optimization_barrier(jnp.where(last_fit >= 0, P, 0))

    if not setup.two_sided:
        return read(stored, key, x.view.m), None
    return read(stored.P, key, x.view.m), read(stored.K, jax.random.fold_in(key, 1), x.view.n)


def seeds_of(seed: int, path: str, batch: int) -> np.ndarray:
    """(b, 2) uint32, of each matrix of a leaf what its keys are made from: the same in every run."""
    digest = lambda i: hashlib.blake2b(f"{seed}/{i}/{path}".encode(), digest_size=8).digest()
    return np.frombuffer(b"".join(map(digest, range(batch))), "<u4").reshape(batch, 2)


def _key(seeds, count):
    """The key of one matrix for the fit of one update."""
    # Threefry mixes consecutive keys as well as any others, and `fold_in` is a program of its own for every leaf
    return jax.random.wrap_key_data(seeds + count.astype(jnp.uint32), impl="threefry2x32")


def refit(
    setup: Setup,
    count: jax.Array,
    matrices: Mapping[str, Matrix],
    pending: jax.Array,
    places: Mapping[str, slice],
) -> Refit:
    """Refits the matrices in `pending` whose gradient is finite and nonzero; the others keep their basis.

    What was fitted comes with each leaf as well, (b,): it then waits for the refits of its own program only.

    Args:
      setup: of the run.
      count: () int32, updates so far.
      matrices: by path.
      pending: (k,) bool.
      places: of each leaf in `pending`, see `positions`.
    """
    groups = collections.defaultdict(list)
    for path in places:
        groups[_alike(setup, matrices[path])].append(path)
    leaves, order, fitted, energy = {}, [], [], []
    for paths in groups.values():
        # to derivatives a basis is a constant, and so are moments that turn with it: the loop below has none
        group = [lax.stop_gradient(matrices[path]) for path in paths]
        # one gather, where a slice for each leaf would be so many programs
        order.append(np.r_[tuple(places[path] for path in paths)])
        done = _refit_alike(setup, count, group, pending[order[-1]])
        within = positions({path: matrices[path].view.batch for path in paths})
        for path, (basis, rule) in zip(paths, done.leaves, strict=True):
            rule = rule if setup.turn else matrices[path].leaf.rule
            leaves[path] = basis, rule, done.fitted[within[path]]
        fitted.append(done.fitted)
        energy.append(done.energy)
    back = np.argsort(np.concatenate(order))
    in_place = lambda of_groups: jnp.concatenate(of_groups)[back]
    return Refit(leaves, in_place(fitted), in_place(energy))


def _alike(setup, x: Matrix):
    """Leaves with the same of this are refit by one program.

    Columns of zeros beside a gradient change no basis that is made of its columns, so that n may differ, up to 4 m, as
    zeros cost time. It may not where states of rules turn, which know no zeros, or devices would exchange them.
    """
    view, stored = x.view, jax.tree.leaves(x.leaf.basis)
    fixed = setup.turn or setup.recall or setup.axis_name or not setup.basis.in_range
    n = view.n if fixed or view.n > 4 * view.m else None
    return view.m, n, x.rank, x.gradient.dtype, tuple(y.dtype for y in stored)


@functools.partial(jax.jit, static_argnums=0)  # so that a step outside jit compiles it once
def _refit_alike(setup, count, matrices, pending) -> Refit:
    batches = [x.view.batch for x in matrices]
    widest = max(matrices, key=lambda x: x.view.n)
    leaf_of = jnp.array([leaf for leaf, b in enumerate(batches) for _ in range(b)], jnp.int32)
    layer_of = jnp.array([layer for b in batches for layer in range(b)], jnp.int32)
    seeds = jnp.concatenate([x.seeds for x in matrices])

    def one(i, done):
        leaf, layer = leaf_of[i], layer_of[i]
        gradient = _gradient(setup, matrices, leaf, layer)
        loaded = _load(setup, matrices, done.leaves, leaf, layer, widest)
        new, good, energy = _fit_one(setup, widest, gradient, loaded, count, seeds[i])
        written = put_in(done.leaves, jnp.where(good, leaf, -1), layer, new)
        return Refit(written, *put(done[1:], i, (good, energy)))

    k = len(leaf_of)
    leaves = tuple((x.leaf.basis, x.leaf.rule if setup.turn else ()) for x in matrices)
    start = Refit(leaves, jnp.zeros(k, bool), jnp.zeros(k, jnp.float32))
    return for_each(pending, one, start)


class _Loaded(NamedTuple):
    """Of one matrix, before its refit."""

    recalled: jax.Array | None  # (r, n), of its rule
    basis: Any
    rule: Any  # its state, if it turns
    last_fit: jax.Array


def _over(start, x):
    """A larger array whose beginning is replaced by `x`."""
    return lax.dynamic_update_slice(start, x, (0,) * x.ndim)


def _pick(leaf, branches, *operands):
    """The result of one branch, that of the leaf."""
    # every branch is passed what any of them reads, which of hundreds is long to compile
    some = 16
    if len(branches) > some:
        parts = [branches[i : i + some] for i in range(0, len(branches), some)]
        branches = [functools.partial(_pick, leaf % some, part) for part in parts]
        leaf = leaf // some
    return lax.switch(leaf, branches, *operands) if len(branches) > 1 else branches[0](*operands)


def _load(setup, matrices, leaves, leaf, layer, widest) -> _Loaded:
    def load(x, written):
        recalled = None
        basis, rule = entry(written, layer)
        if setup.two_sided and x.view.n < widest.view.n:
            start = setup.basis.init(widest.view.n, x.rank, wide(x.gradient))
            basis = basis._replace(K=jax.tree.map(_over, start, basis.K))
        if setup.recall:
            state = rule if setup.turn else entry(x.leaf.rule, layer)
            recalled = setup.recall(state).astype(wide(x.gradient))
        return _Loaded(recalled, basis, rule, x.last_fit[layer])

    loads = [functools.partial(load, *of) for of in zip(matrices, leaves, strict=True)]
    return _pick(leaf, loads)


def _gradient(setup, matrices, leaf, layer):
    """One matrix's gradient, or the geometry's: what is returned, `apply(f, *operands)`, is f(view, G, *operands).

    Of leaves of one shape, which a mesh may hold in different ways, only what f makes of a matrix travels; and so it is
    of gradients that differ by device: products are averaged, of ‖G‖² and the largest entry a bound. G has its axes as
    the leaf holds them.
    """

    def load(x):
        of = lambda leaf: x.view.in_memory(x.view.matrix(leaf, layer))
        G = of(x.gradient)
        return setup.tangent(G, of(x.weight), x.view.sum_axis_in_memory)[0] if setup.tangent else G

    def apply(f, *operands):
        def branch(x, *operands):
            compute = lambda *operands: f(x.view, load(x), *operands)
            of_stack = x.view.batch > 1
            return unmoved(layer, compute, *operands) if of_stack else compute(*operands)

        branches = [functools.partial(branch, x) for x in matrices]
        return mean_over(setup.axis_name, _pick(leaf, branches, *operands))

    return apply


def _divided(apply, scale, shape, dtype) -> LinearOperator:
    """The gradient by `scale`, with columns of zeros up to `shape`."""
    filled = lambda x: jnp.pad(x, ((0, shape[1] - len(x)), (0, 0)))
    divided = lambda G: G.astype(dtype) / scale
    # in products the thin factor is divided: no copy of G
    G_X = lambda view, G, X: times(G, X[: view.n], axis=0 if view.flipped else 1)
    GT_Y = lambda view, G, Y: filled(times(G, Y, axis=1 if view.flipped else 0))
    return LinearOperator(
        shape,
        dtype,
        lambda X: apply(G_X, X / scale),
        lambda Y: apply(GT_Y, Y / scale),
        lambda: apply(lambda view, G: jnp.sum(jnp.square(divided(G)))),
        lambda: apply(lambda view, G: filled(view.in_memory(divided(G)).T).T),
    )


def _fit_one(setup, x, gradient, loaded, count, seeds):
    """((basis, rule), good, ‖G‖²) of one matrix; not good if the gradient is unusable or the basis is none."""
    view, dtype, recalled = x.view, wide(x.gradient), loaded.recalled
    P, K = read_bases(setup, x, loaded.basis, seeds, loaded.last_fit)
    key = _key(seeds, count)
    largest = gradient(lambda view, G: jnp.max(jnp.abs(G)).astype(dtype))
    if recalled is not None:
        recalled = recalled if K is None else matmul(recalled, K.T)
        largest = jnp.maximum(largest, jnp.max(jnp.abs(recalled)))
    usable = jnp.isfinite(largest) & (largest > jnp.finfo(dtype).tiny)

    def fit():
        # 1 / least is finite, with room for the products
        least = float(jnp.finfo(dtype).tiny) ** 0.8
        scale = jnp.clip(largest, least, 1 / least)
        unit = _divided(gradient, scale, (view.m, view.n), dtype)
        energy = (unit.energy() * scale**2).astype(jnp.float32)
        if recalled is not None:
            unit = unit.plus(P, recalled / scale)
        new, good = setup.basis.refit(key, unit, P)
        if setup.two_sided:
            R_T = unit.T @ setup.basis.read(new, key, view.m, x.rank, dtype)
            other, good_K = setup.basis.refit(jax.random.fold_in(key, 1), R_T, K)
            new, good = TwoSided(new, other), good & good_K
        return (new, turned(new)), good, jnp.where(good, energy, 0)

    def turned(new):
        if not setup.turn:
            return ()
        P_new, K_new = read_bases(setup, x, new, seeds, count)
        turn = Turn(matmul(P_new.T, P), None if K is None else matmul(K_new.T, K))
        return setup.turn(loaded.rule, turn)

    nothing = jax.tree.map(jnp.zeros_like, (loaded.basis, loaded.rule))
    return cond(usable, fit, lambda: (nothing, jnp.bool_(False), jnp.float32(0)))
