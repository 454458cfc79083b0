"""How bases are refit: one compiled program per distinct folded shape, one matrix after the other.

Compile time does not grow with the number of layers, and never more than one matrix is copied out of its leaf. The
question "refit now?" is only ever looked at as a scalar inside a loop: a batched predicate would turn `lax.cond` into
a select that factorizes every matrix on every step.
"""

import collections
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_lowrank.bases import Basis
from optax_lowrank.linalg import matmul
from optax_lowrank.rules import Turn, wide
from optax_lowrank.views import MatrixView
from optax_lowrank.walls import cond, loop


class Plan(NamedTuple):
    """What the refits of a run have in common; hashable."""

    basis: Basis
    two_sided: bool
    turns: bool  # are rotations wanted?
    seed: int
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


class Matrix(NamedTuple):
    """What an update knows of one leaf, a stack of b matrices."""

    path: str
    view: MatrixView
    rank: int
    gradient: jax.Array  # in the leaf's shape
    weight: jax.Array | None  # the same, where it is wanted
    leaf: Leaf
    last_fit: jax.Array  # (b,) int32
    fitted: jax.Array | None  # (b,) bool, known after the refresh


class Refit(NamedTuple):
    """Outcome of the refresh of one step."""

    stored: dict[str, Any]  # (b, ...)
    turn: dict[
        str, Turn | None
    ]  # (b, r, r); the identity where nothing was fitted, None where nobody asks
    fitted: jax.Array  # (k,) bool
    energy: jax.Array  # (k,) float32, ‖G‖² where fitted


def read_bases(plan: Plan, x: Matrix, stored: Any, layer: jax.Array, last_fit: jax.Array):
    """The bases (P, K) of one matrix of a leaf as they are used, zeros before the first fit; K is None on one side."""
    key = _key(plan, last_fit, _name(x.path), layer)
    return _read(plan, x.view, x.rank, wide(x.gradient), stored, key, last_fit)


def _name(path):
    return zlib.crc32(path.encode())


def _key(plan, count, name, layer):
    key = jax.random.fold_in(jax.random.key(plan.seed), count)
    return jax.random.fold_in(jax.random.fold_in(key, name), layer)


def _read(plan, view, r, dtype, stored, key, last_fit):
    def read(stored, key, size):
        P = plan.basis.read(stored, key, size, r, dtype)
        # what is made from nothing must be nothing before the first fit
        return jnp.where(last_fit >= 0, P, 0) if plan.basis.implicit else P

    if not plan.two_sided:
        return read(stored, key, view.m), None
    return read(stored.P, key, view.m), read(stored.K, jax.random.fold_in(key, 1), view.n)


def refit(
    plan: Plan,
    count: jax.Array,
    matrices: Mapping[str, Matrix],
    pending: jax.Array,
    places: Mapping[str, slice],
) -> Refit:
    """Refits the matrices in `pending` whose gradient is finite and nonzero; the others keep their basis.

    Args:
      plan: of the run.
      count: () int32, updates so far.
      matrices: by path.
      pending: (k,) bool.
      places: of each leaf in `pending`, see `positions`.
    """
    groups = collections.defaultdict(list)
    for path in places:
        x = matrices[path]
        groups[x.view.m, x.view.n, x.rank, x.gradient.dtype].append(path)
    stored, turns, fitted, energy, order = {}, {}, [], [], []
    for paths in groups.values():
        index = jnp.array(
            [i for p in paths for i in range(places[p].start, places[p].stop)], jnp.int32
        )
        group = [matrices[path] for path in paths]
        static = tuple((x.path, x.view, x.rank) for x in group)
        arrays = [_Arrays(x.gradient, *_wanted(plan, x), x.leaf.basis, x.last_fit) for x in group]
        done = _refit_equal_shapes(plan, static, count, arrays, pending[index])
        stored |= dict(zip(paths, done.stored, strict=True))
        turns |= dict(zip(paths, done.turn, strict=True))
        fitted.append(done.fitted)
        energy.append(done.energy)
        order.append(index)
    in_place = jnp.argsort(jnp.concatenate(order))
    return Refit(
        stored, turns, jnp.concatenate(fitted)[in_place], jnp.concatenate(energy)[in_place]
    )


class _Arrays(NamedTuple):
    """What a refit reads of one leaf."""

    gradient: jax.Array
    weight: jax.Array | None
    rule: Any
    stored: Any
    last_fit: jax.Array


def _wanted(plan, x):
    return x.weight if plan.tangent else None, x.leaf.rule if plan.recall else None


@functools.partial(
    jax.jit, static_argnums=(0, 1)
)  # so that a step outside jit does not compile it again
def _refit_equal_shapes(plan, static, count, leaves, pending) -> Refit:
    batches = [view.batch for _, view, _ in static]
    leaf_of = jnp.array([leaf for leaf, b in enumerate(batches) for _ in range(b)], jnp.int32)
    layer_of = jnp.array([layer for b in batches for layer in range(b)], jnp.int32)
    name_of = jnp.array([_name(path) for path, *_ in static], jnp.uint32)
    order = jnp.argsort(~pending)  # those that are due come first
    identity = _identity(plan, *static[0][1:], wide(leaves[0].gradient))

    def one(step, done):
        i = order[step]
        leaf, layer = leaf_of[i], layer_of[i]
        G, recalled, old, last_fit = _load(plan, static, leaves, done[0], leaf, layer)
        keys = [_key(plan, at, name_of[leaf], layer) for at in (last_fit, count)]
        nothing = (old, identity, jnp.bool_(False), jnp.float32(0))
        new = _fit_one(plan, static[0], G, recalled, old, last_fit, count, keys, nothing)
        in_leaf = lambda j: functools.partial(_put_if, leaf == j, layer)
        of_leaves = [
            tuple(jax.tree.map(in_leaf(j), x, value) for j, x in enumerate(column))
            for column, value in zip(done[:2], new[:2], strict=True)
        ]
        put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
        return *of_leaves, *map(put, done[2:], new[2:])

    repeated = lambda b: jax.tree.map(lambda x: jnp.tile(x, (b, 1, 1)), identity)
    k = len(leaf_of)
    numbers = jnp.zeros(k, bool), jnp.zeros(k, jnp.float32)
    start = tuple(x.stored for x in leaves), tuple(map(repeated, batches)), *numbers
    return Refit(*loop(jnp.sum(pending, dtype=jnp.int32), one, start))


def _put_if(chosen, layer, x, y):
    """X with y for its entry `layer`, if chosen; in place, which a branch is not."""
    at = jnp.where(chosen, layer, 0)
    old = lax.dynamic_index_in_dim(x, at, keepdims=False)
    return lax.dynamic_update_index_in_dim(x, jnp.where(chosen, y, old), at, 0)


def _identity(plan, view, r, dtype) -> Turn | None:
    if not plan.turns:
        return None
    return Turn(jnp.eye(r, dtype=dtype), jnp.eye(r, dtype=dtype) if plan.two_sided else None)


def _load(plan, static, leaves, stored, leaf, layer):
    """Of one matrix the gradient (the geometry's, if it has one), what its rule recalls, its basis, its last fit."""

    def of(x, view, stored):
        def read():
            G, recalled, at = view.matrix(x.gradient, layer), None, lambda a: a[layer]
            if plan.tangent:
                G, _ = plan.tangent(G, view.matrix(x.weight, layer), view.sum_axis)
            if plan.recall:
                recalled = plan.recall(jax.tree.map(at, x.rule)).astype(wide(x.gradient))
            return G.astype(wide(x.gradient)), recalled, jax.tree.map(at, stored), x.last_fit[layer]

        return read

    branches = [
        of(x, view, old) for x, (_, view, _), old in zip(leaves, static, stored, strict=True)
    ]
    return lax.switch(leaf, branches) if len(branches) > 1 else branches[0]()


def _fit_one(plan, static, G, recalled, old, last_fit, count, keys, nothing):
    """(stored, turn, True, ‖G‖²) of one matrix, or `nothing` where gradient or basis are no good."""
    _, view, r = static
    old_key, key = keys
    read = functools.partial(_read, plan, view, r, G.dtype)
    P, K = read(old, old_key, last_fit)
    if recalled is not None:
        G = G + matmul(P, recalled if K is None else matmul(recalled, K.T))
    largest = jnp.max(jnp.abs(G))
    usable = jnp.isfinite(largest) & (largest > jnp.finfo(G.dtype).tiny)

    def fit():
        unit = G / largest
        new, good = plan.basis.refit(key, unit, P)
        if plan.two_sided:
            R = matmul(plan.basis.read(new, key, view.m, r, G.dtype).T, unit)
            other, good_K = plan.basis.refit(jax.random.fold_in(key, 1), R.T, K)
            new, good = TwoSided(new, other), good & good_K
        energy = (jnp.sum(jnp.square(unit)) * largest**2).astype(jnp.float32)
        return cond(good, lambda: (new, turn(new), jnp.bool_(True), energy), lambda: nothing)

    def turn(new):
        if not plan.turns:
            return None
        P_new, K_new = read(new, key, count)
        return Turn(matmul(P_new.T, P), None if K is None else matmul(K_new.T, K))

    return cond(usable, fit, lambda: nothing)
