"""Paths and geometry: what a leaf is called, and how it folds to `G` of shape (b, m, n).

A leaf is known by its path, never by its place in a treedef: Flax NNX shows an optimizer boxed leaves at `init` and
bare ones at `update`, and `optax.masked` shows it a part of the tree. Which axes a layer sums over and which it
produces is for `classify` to say; `MatrixView` puts the side to be projected first, so that nothing else in the
package knows left from right.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax import lax

Shape = tuple[int, ...]

# ---------------------------------------------------------------------------------------------------------- paths


def leaf_path(key_path) -> str:
    """The keys of a leaf as one name: `layers/0/kernel`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_with_path(tree, is_leaf=None) -> list[tuple[tuple, Any]]:
    """`jax.tree.leaves_with_path` in which a box has no key: a leaf's key path is the same boxed and bare.

    A box is a node of one of Flax's classes (`nnx.Param` and any other `Variable`; `nn.Partitioned` and any other
    `AxisMetadata`) or a `NamedArray` of Haliax, wherever in the tree it stands. A field of the user's that is called
    `value` keeps its key.
    """
    is_leaf = is_leaf or (lambda node: False)
    found = []
    nodes = jax.tree.leaves_with_path(tree, is_leaf=lambda node: is_leaf(node) or _is_box(node))
    for key_path, node in nodes:
        if is_leaf(node) or not _is_box(node):
            found.append((key_path, node))
        else:
            inside = leaves_with_path(_content(node), is_leaf)
            found += [(key_path + keys, leaf) for keys, leaf in inside]
    return found


def flatten_by_path(tree, is_leaf=None) -> tuple[dict[str, Any], Any]:
    """Leaves by path in tree order, and the treedef: `treedef.unflatten(leaves.values())` is the tree again.

    Raises:
      ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in leaves_with_path(tree, is_leaf):
        path = leaf_path(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves have the path {path!r}. Rename one: optimizer state is kept by path."
            )
        leaves[path] = leaf
    return leaves, jax.tree.structure(tree, is_leaf)


_NUMBER = re.compile(r"(?<![^/_])\d+(?=/)")  # of `layers/3/kernel`, `layers_3/kernel`


def equal_leaves(
    paths: Iterable[str], what: Callable[[str], Hashable] = lambda path: None
) -> dict[str, list[str]]:
    """Groups by name of the leaves whose paths differ only in numbers and that are the same by `what`.

    A group is called `layers/*/kernel`, or, where several would be called so, by its first leaf and its last.
    """
    groups: dict[tuple, list[str]] = {}
    for path in paths:
        groups.setdefault((_NUMBER.sub("*", path), what(path)), []).append(path)
    named = Counter(name for name, _ in groups)
    name_of = lambda name, group: name if named[name] == 1 else f"{group[0]} … {group[-1]}"
    return {
        group[0] if len(group) == 1 else name_of(name, group): group
        for (name, _), group in groups.items()
    }


def belongs_to(node, library: str, *classes: str) -> bool:
    """Whether `node` is an instance of one of a library's classes, known by name: the library may not be installed."""
    return any(
        base.__name__ in classes and base.__module__.partition(".")[0] == library
        for base in type(node).__mro__
    )


def _is_box(node) -> bool:
    named = belongs_to(node, "flax", "Variable", "VariableState", "AxisMetadata")
    named = named or belongs_to(node, "haliax", "NamedArray")
    return named and not jax.tree_util.all_leaves([node])


def _content(box):
    """What is in a box: its children, without their keys where there is only one."""
    children = jax.tree.leaves(box, is_leaf=lambda node: node is not box)
    return children[0] if len(children) == 1 else children


def owned_leaves(state, params) -> list[tuple[tuple, Any, str | None]]:
    """(key path, array, path of its parameter or None) of every array of an optimizer state, in tree order.

    Told by structure, never by the name of a leaf: a subtree that is a tree like the parameters (masked or boxed ones
    as well), or a dict by path, which is how this library keeps its own state.
    """
    paths = set(flatten_by_path(params)[0])
    is_masked = lambda node: type(node).__name__ == "MaskedNode"
    # dicts of Optax's whose keys are labels: a leaf may be called like one
    labelled = {"inner_states", "hyperparams", "hyperparams_states"}

    def visit(keys, node) -> list:
        by_label = keys and getattr(keys[-1], "name", None) in labelled
        if isinstance(node, Mapping) and node and set(node) <= paths and not by_label:
            own = [((jax.tree_util.DictKey(path),), child) for path, child in node.items()]
        else:
            own = leaves_with_path(node, is_masked)
            if {leaf_path(key) for key, _ in own} != paths:
                below = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
                if len(below) == 1 and below[0][1] is node:
                    return [(keys, node, None)]
                return [found for key, child in below for found in visit(keys + key, child)]
        return [
            (keys + key + inner, x, leaf_path(key))
            for key, child in own
            for inner, x in leaves_with_path(child, is_masked)
            if not is_masked(x)
        ]

    return visit((), state)


# ----------------------------------------------------------------------------------------------------------- views


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of one leaf that make a matrix: summed over (`reduction_axis`) and produced (`output_axis`).

    Each is an int or a tuple of ints, which fold into one side; negative axes count from the end. Axes in neither are
    batch axes: the leaf is a stack of matrices, each with a basis of its own.

    Example:
      >>> from optax_lowrank import MatrixAxes
      >>> MatrixAxes(0, (1, 2))  # an attention query kernel, (d, heads, head_dim): one matrix, d by heads * head_dim
      MatrixAxes(reduction_axis=0, output_axis=(1, 2))
      >>> per_head = MatrixAxes(0, 2)  # the same leaf, each head on its own: axis 1 is a batch axis
    """

    reduction_axis: int | tuple[int, ...]
    output_axis: int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How one leaf folds to (b, m, n): static, hashable, made by `MatrixView.of`.

    Example:
      >>> view = MatrixView.of((64, 4, 8), MatrixAxes(0, (1, 2)), side="short")
      >>> (view.batch, view.m, view.n), view.projected_axes
      ((1, 32, 64), (1, 2))
      >>> view.fold(jnp.ones((64, 4, 8))).shape
      (1, 32, 64)
    """

    shape: Shape
    batch_axes: tuple[int, ...]
    projected_axes: tuple[int, ...]
    other_axes: tuple[int, ...]
    sum_axis: int = 0  # of one matrix, what the layer sums over; 1: the output side is projected

    @classmethod
    def of(
        cls,
        shape: Iterable[int],
        axes: MatrixAxes,
        side: Literal["short", "long", "reduction", "both"] = "short",
    ) -> Self:
        """The view of a leaf of this shape with its shorter, its longer or its reduction side projected.

        A square matrix is projected on its reduction side in any case. Where both sides are projected, `G` lies as
        for the shorter one.

        Raises:
          ValueError: `axes` do not fit `shape`, or `side` is unknown.
        """
        shape = tuple(shape)
        reduction, output = sides_of(axes, shape, f"a leaf of shape {shape}")
        excess = _size(shape, output) - _size(shape, reduction)
        sides = {"short": excess >= 0, "both": excess >= 0, "long": excess <= 0, "reduction": True}
        if side not in sides:
            raise ValueError(f"side={side!r} must be one of {', '.join(map(repr, sides))}.")
        batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
        if sides[side]:  # the reduction side is projected
            return cls(shape, batch, reduction, output, sum_axis=0)
        return cls(shape, batch, output, reduction, sum_axis=1)

    @property
    def batch(self) -> int:
        """Number of matrices, `b`."""
        return _size(self.shape, self.batch_axes)

    @property
    def m(self) -> int:
        """Size of the projected side."""
        return _size(self.shape, self.projected_axes)

    @property
    def n(self) -> int:
        """Size of the other side."""
        return _size(self.shape, self.other_axes)

    @property
    def flipped(self) -> bool:
        """Whether the leaf holds Gᵀ: its projected side comes after the other one in memory."""
        return self.other_axes < self.projected_axes

    @property
    def sum_axis_in_memory(self) -> int:
        """The axis that the layer sums over, of a matrix `in_memory`."""
        return 1 - self.sum_axis if self.flipped else self.sum_axis

    def in_memory(self, G: jax.Array | None) -> jax.Array | None:
        """One matrix (m, n) with its axes as the leaf holds them, or back again; None stays."""
        return G.mT if self.flipped and G is not None else G

    def fold(self, x: jax.Array) -> jax.Array:
        """`x` as (b, m, n), in its own dtype."""
        return jnp.transpose(x, self._order).reshape(self.batch, self.m, self.n)

    def unfold(self, G: jax.Array) -> jax.Array:
        """(b, m, n) back to the leaf's shape: the inverse of `fold`."""
        back = sorted(range(len(self.shape)), key=self._order.__getitem__)
        return jnp.transpose(G.reshape([self.shape[a] for a in self._order]), back)

    def per_matrix(self, x: jax.Array) -> jax.Array:
        """(b,), one number a matrix, as an array that broadcasts against the leaf."""
        return x.reshape([size if a in self.batch_axes else 1 for a, size in enumerate(self.shape)])

    def product(self, P: jax.Array, N: jax.Array) -> jax.Array:
        """P N `in_memory`: (m, n), or (n, m) as Nᵀ Pᵀ."""
        return lax.dot_general(N, P, (((0,), (1,)), ((), ()))) if self.flipped else jnp.matmul(P, N)

    def matrix(self, x: jax.Array, i) -> jax.Array:
        """`fold(x)[i]`, (m, n), for an index that may be traced, without folding the rest of the stack."""
        i = jnp.asarray(i)
        start, size = [jnp.zeros_like(i)] * len(self.shape), list(self.shape)
        for axis in reversed(self.batch_axes):
            i, start[axis] = divmod(i, self.shape[axis])
            size[axis] = 1
        # slice before transposing: the other way round XLA copies the whole stack
        piece = lax.dynamic_slice(x, start, size) if self.batch_axes else x
        # no batch axes in what is transposed, so that `in_memory` undoes it at no cost
        of_sides = [a for a in range(x.ndim) if a not in self.batch_axes]
        piece = piece.reshape([self.shape[a] for a in of_sides])
        order = [of_sides.index(a) for a in self.projected_axes + self.other_axes]
        return jnp.transpose(piece, order).reshape(self.m, self.n)

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.projected_axes + self.other_axes


def _size(shape: Shape, axes: tuple[int, ...]) -> int:
    return math.prod(shape[a] for a in axes)


def sides_of(axes: MatrixAxes, shape: Shape, leaf: str) -> list[tuple[int, ...]]:
    """Both sides as tuples of axes counted from 0, checked against the shape; `leaf` is for errors."""

    def fail(problem: str):
        remedy = "Give axes that do, or None to leave the leaf dense."
        return ValueError(f"{axes} does not fit {leaf}: {problem}. {remedy}")

    sides = []
    for name in ("reduction_axis", "output_axis"):
        given = getattr(axes, name)
        side = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        if not side or not all(isinstance(axis, int) for axis in side):
            raise fail(f"{name} is neither an int nor a tuple of at least one int")
        for axis in side:
            if not -len(shape) <= axis < len(shape):
                raise fail(f"axis {axis} of {name} is out of range")
        sides.append(tuple(axis % len(shape) for axis in side))
    if len(set(sides[0] + sides[1])) < len(sides[0] + sides[1]):
        raise fail("an axis is repeated")
    if 0 in shape:
        raise fail("an axis has size 0")
    return sides
