"""Matrix views: which parameters are matrices, and how each of them folds to `G` of shape (b, m, n).

A leaf is known by its path, never by its place in a treedef: Flax NNX shows an optimizer boxed leaves at `init` and
bare ones at `update`, and `optax.masked` shows it a part of the tree. From path and shape the classifier (its rules
stand in `matrix_axes`) says which axes a layer sums over and which it produces; `MatrixView` puts the side to be
projected first, so that nothing else in the package knows left from right.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Shape = tuple[int, ...]

# ---------------------------------------------------------------------------------------------------------- paths


def leaf_path(key_path) -> str:
    """The name of a leaf, equal for boxed and bare parameters: `layers/0/kernel`.

    One trailing attribute `.value` is dropped: it is the box (`nnx.Param`, `nn.Partitioned`), not the leaf. A dict key
    "value" stays.
    """
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten_by_path(tree, is_leaf=None) -> tuple[dict[str, Any], Any]:
    """Leaves by path in tree order, and the treedef: `treedef.unflatten(leaves.values())` is the tree again.

    Raises:
        ValueError: two leaves have the same path.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    leaves: dict[str, Any] = {}
    for key_path, leaf in keyed:
        path = leaf_path(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves have the path {path!r}. Rename one: optimizer state is kept by path."
            )
        leaves[path] = leaf
    return leaves, treedef


def owner(key_path, paths) -> str | None:
    """Which of `paths` an array of an optimizer state belongs to: `0/mu/up/kernel` to `up/kernel`, `0/count` to none.

    The longest one that stands in the array's own path, of equals the last: a state repeats its parameters' paths.
    """
    parts = leaf_path(key_path).split("/")
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length, -1, -1):
            path = "/".join(parts[start : start + length])
            if path in paths:
                return path
    return None


# ----------------------------------------------------------------------------------------------------------- views


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of one leaf that make a matrix: summed over (`reduction_axis`) and produced (`output_axis`).

    Each is an int or a tuple of ints, which fold into one side; negative axes count from the end. Axes in neither are
    batch axes: the leaf is a stack of matrices, each with a basis of its own.

    Example:
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

    @classmethod
    def of(
        cls,
        shape: Iterable[int],
        axes: MatrixAxes,
        side: Literal["short", "long", "reduction"] = "short",
    ) -> MatrixView:
        """The view of a leaf of this shape with its shorter, its longer or its reduction side projected.

        A square matrix is projected on its reduction side in any case.

        Raises:
            ValueError: `axes` do not fit `shape`, or `side` is unknown.
        """
        if side not in ("short", "long", "reduction"):
            raise ValueError(f"side={side!r} must be 'short', 'long' or 'reduction'.")
        shape = tuple(shape)
        reduction, output = _sides(axes, shape, f"a leaf of shape {shape}")
        batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
        excess = _size(shape, output) - _size(shape, reduction)
        reduction_first = {"short": excess >= 0, "long": excess <= 0, "reduction": True}[side]
        return cls(shape, batch, *((reduction, output) if reduction_first else (output, reduction)))

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

    def fold(self, x: jax.Array) -> jax.Array:
        """`x` as (b, m, n), in its own dtype."""
        return jnp.transpose(x, self._order).reshape(self.batch, self.m, self.n)

    def unfold(self, G: jax.Array) -> jax.Array:
        """(b, m, n) back to the leaf's shape: the inverse of `fold`."""
        back = sorted(range(len(self.shape)), key=self._order.__getitem__)
        return jnp.transpose(G.reshape([self.shape[a] for a in self._order]), back)

    def product(self, P: jax.Array, N: jax.Array) -> jax.Array:
        """P N, (b, m, n), as (Nᵀ Pᵀ)ᵀ where the leaf lies so in memory: `unfold` then moves nothing."""
        if self.other_axes < self.projected_axes:
            return jnp.matmul(N.mT, P.mT).mT
        return jnp.matmul(P, N)

    def matrix(self, x: jax.Array, i) -> jax.Array:
        """`fold(x)[i]`, (m, n), for an index that may be traced, without folding the rest of the stack."""
        i = jnp.asarray(i)
        start, size = [jnp.zeros_like(i)] * len(self.shape), list(self.shape)
        for axis in reversed(self.batch_axes):
            i, start[axis] = divmod(i, self.shape[axis])
            size[axis] = 1
        # slice before transposing: the other way round XLA copies the whole stack
        piece = lax.dynamic_slice(x, start, size) if self.batch_axes else x
        return jnp.transpose(piece, self._order).reshape(self.m, self.n)

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.projected_axes + self.other_axes


def _size(shape: Shape, axes: tuple[int, ...]) -> int:
    return math.prod(shape[a] for a in axes)


def _sides(axes: MatrixAxes, shape: Shape, leaf: str) -> list[tuple[int, ...]]:
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


# ------------------------------------------------------------------------------------------------------ classifier


def _tail(words: str) -> str:
    """A pattern for `words` in the last two components of a path, whatever their case and Linen's `_0`."""
    return rf"(?i)(^|/)({words})(_\d+)?(/[^/]*)?$"


def _largest(sizes: Shape) -> int:
    return max(range(len(sizes)), key=lambda axis: (sizes[axis], axis))


def _has_heads(model: int, heads: int, head_dim: int) -> bool:
    # attention has heads * head_dim at most 4 * d; stacked (L, d, d) kernels of the same name fail by far
    return head_dim < model and heads * head_dim <= 4 * model


class _Rule(NamedTuple):
    why: str
    path: str = ""  # searched in the leaf's path
    shape: Callable[[Shape], bool] = lambda shape: True
    axes: Callable[[Shape], MatrixAxes | None] = lambda shape: None


_MOE = r"(?i)(?<!shared)(?<!shared_)expert|moe[^/]*/(?!(gate|router)(/|$))([^/]*/)?[^/]*$"
_QKV = _tail(r"(query|key|value|q|k|v|kv|qkv)(_proj)?|w[qkv]")
_OUT = _tail(r"(out|o)(_proj)?|wo")
_RULES = (  # the first that fits wins; the docstring of `matrix_axes` is this table in words
    _Rule("coordinates", r"(^|/)[IJR]$", lambda s: len(s) == 3, lambda s: MatrixAxes(1, 2)),
    _Rule("bias or scale", r"(?i)(^|[/_])(bias|scale)$|(^|/)(b\d*|gamma|beta)$"),
    _Rule("norm", _tail(r"[^/]*norm[^/]*|ln\d*|ln_[^/]*|[^/]*_ln")),
    _Rule("embedding", _tail(r"[^/]*embed[^/]*|([^/]*_)?emb|w[tp]e")),
    _Rule("head", _tail(r"([^/]*_)?(lm)?head|[^/]*logits[^/]*|classifier")),
    _Rule("fewer than 2 axes", shape=lambda s: len(s) < 2),
    _Rule("kernel", shape=lambda s: len(s) == 2, axes=lambda s: MatrixAxes(0, 1)),
    _Rule(
        "convolution", _tail("[^/]*conv[^/]*"), axes=lambda s: MatrixAxes((*range(len(s) - 1),), -1)
    ),
    _Rule("experts", _MOE, axes=lambda s: MatrixAxes(-2, -1)),
    _Rule(
        "attention input",
        _QKV,
        lambda s: _has_heads(max(s[:-2]), *s[-2:]),
        lambda s: MatrixAxes(_largest(s[:-2]), (-2, -1)),
    ),
    _Rule(
        "attention output",
        _OUT,
        lambda s: _has_heads(s[-1], *s[-3:-1]),
        lambda s: MatrixAxes((-3, -2), -1),
    ),
    _Rule("stacked kernels", axes=lambda s: MatrixAxes(_largest(s[:-1]), -1)),
)


def _classify(path: str, shape: Shape) -> tuple[MatrixAxes | None, str]:
    rule = next(rule for rule in _RULES if re.search(rule.path, path) and rule.shape(shape))
    axes = rule.axes(shape)
    if axes is None or rule.why == "coordinates":
        return axes, rule.why
    if 0 in shape:
        return None, "empty"
    if min(_size(shape, side) for side in _sides(axes, shape, path)) == 1:
        return None, "vector: one side has size 1"
    return axes, rule.why


# ------------------------------------------------------------------------------------------------------- overrides


def _is_axes(x) -> bool:
    return x is None or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, paths)) or "none"


def _overridden(paths: Iterable[str], overrides, strict: bool) -> dict[str, tuple[Any, str]]:
    """What `overrides` say about these paths, with the reason to show; silent on the leaves they leave to the rules."""
    if overrides is None:
        return {}
    if _is_axes(overrides):
        return {path: (overrides, "override") for path in paths}
    if isinstance(overrides, Mapping) and all(
        isinstance(k, str) and _is_axes(v) for k, v in overrides.items()
    ):
        return _by_pattern(paths, overrides, strict)
    given, _ = flatten_by_path(overrides, is_leaf=_is_axes)
    for path, axes in given.items():
        if not _is_axes(axes):
            raise ValueError(f"the override of leaf {path!r} is {axes!r}; give MatrixAxes or None.")
    missing = [path for path in paths if path not in given]
    extra = [path for path in given if path not in paths] if strict else []
    if missing or extra:
        raise ValueError(
            f"the tree of overrides is not like params: it lacks {_listed(missing)} and adds "
            f"{_listed(extra)}. Give each leaf MatrixAxes or None, or a few a dict {{regex: axes}}."
        )
    return {path: (given[path], "override") for path in paths}


def _by_pattern(
    paths: Iterable[str], patterns: Mapping[str, Any], strict: bool
) -> dict[str, tuple[Any, str]]:
    chosen, used = {}, set()
    for path in paths:
        try:
            matches = [key for key in patterns if key == path or re.search(key, path)]
        except re.error as error:
            raise ValueError(f"{error.pattern!r} is no regular expression: {error}.") from error
        used.update(matches)
        if matches:
            key = path if path in patterns else matches[0]
            chosen[path] = patterns[key], f"override {key!r}"
    idle = [key for key in patterns if key not in used]
    if strict and idle:
        raise ValueError(f"overrides {_listed(idle)} match no leaf. The paths: {_listed(paths)}.")
    return chosen


class _Decision(NamedTuple):
    axes: MatrixAxes | None
    why: str
    shape: Shape


def _decide(params, overrides, strict: bool) -> dict[str, _Decision]:
    """Axes, reason and shape by path: what `axes_by_path`, `matrix_axes` and `describe` show a part of."""
    leaves, _ = flatten_by_path(params)
    chosen = _overridden(leaves, overrides(params) if callable(overrides) else overrides, strict)
    decisions = {}
    for path, leaf in leaves.items():
        shape = tuple(getattr(leaf, "shape", ()))
        axes, why = chosen[path] if path in chosen else _classify(path, shape)
        if axes is not None:
            sides = _sides(axes, shape, f"leaf {path!r} of shape {shape}")
            axes = MatrixAxes(*(side[0] if len(side) == 1 else side for side in sides))
        decisions[path] = _Decision(axes, why, shape)
    return decisions


def axes_by_path(params, overrides=None, *, strict: bool = True) -> dict[str, MatrixAxes | None]:
    """`matrix_axes` as a dict by path, in tree order, axes counted from 0.

    With `strict=False` overrides may speak of leaves that are not in `params`, as they do when `optax.masked` or
    `optax.partition` has taken some away. A leaf's answer does not depend on which other leaves are there.
    """
    return {path: decision.axes for path, decision in _decide(params, overrides, strict).items()}


def matrix_axes(params, overrides=None):
    """A tree like `params` with the `MatrixAxes` of every leaf that is a matrix, and None (dense) for the others.

    The first rule that fits decides. Names are looked for in the last two components of the path, whatever their case
    and a final `_0`; d and m are the largest of the axes they could be (of equals the last), which is how a layer axis
    L is told from them at scan axis 0 or 1.

    | rule | names | shape | reduction → output |
    |---|---|---|---|
    | coordinates, adapters | path ends in `R`, `I` or `J` | (b, m, n) | 1 → 2 |
    | bias or scale | ends in `bias`, `*_bias`, `scale`, `*_scale`, `b`, `b1`, `gamma`, `beta` | any | dense |
    | norm | contains `norm`; `ln`, `ln1`, `ln_*`, `*_ln` | any | dense |
    | embedding | contains `embed`; `emb`, `*_emb`, `wte`, `wpe` | any | dense |
    | head | `head`, `*_head`, `lmhead`, `classifier`, contains `logits` | any | dense |
    | fewer than 2 axes | any | (), (n,) | dense |
    | kernel | any | (m, n) | 0 → 1 |
    | convolution | contains `conv` | (..., c_in, c_out) | all others → -1 |
    | experts | `expert` anywhere, not after `shared_`; `moe` above any but `gate`, `router` | (..., m, n) | -2 → -1 |
    | attention input | `query`, `key`, `value`, `q`, `k`, `v`, `kv`, `qkv`, these with `_proj`; `wq`, `wk`, `wv` | \
(d, heads, hd), (L, d, heads, hd), (d, L, heads, hd), (d, 3, heads, hd) | d → (-2, -1) |
    | attention output | `out`, `o`, these with `_proj`; `wo` | (heads, hd, d), (L, heads, hd, d) | (-3, -2) → -1 |
    | stacked kernels | any | (L, m, n), (m, L, n), ... | largest of the others → -1 |

    Attention needs hd < d and heads * hd ≤ 4 d, or it counts as stacked kernels. A matrix with a side of size 1 is a
    vector: dense. Shape cannot settle everything: an attention output stacked at axis 1, (heads, L, hd, d), is taken
    for one at axis 0, and layers that outnumber a side for that side. `describe` shows it; an override settles it.

    Args:
        params: a tree of anything with a shape: arrays, `jax.ShapeDtypeStruct`, boxed or not.
        overrides: None, or one of these, where axes are `MatrixAxes`, anything else with `reduction_axis` and
            `output_axis`, or None for dense:

            * a tree like `params` of axes, which decides every leaf; matched by path;
            * a dict `{regex: axes}`: the first `re.search` on the path wins, unmatched leaves keep the rules. A key
              that *is* a leaf's path speaks first for that leaf, so a flat tree of axes means the same either way;
            * a function of `params` (of the updates, in `update`) that returns one of the two.

    Raises:
        ValueError: axes do not fit their leaf, a pattern matches no leaf, or a tree's paths are not those of `params`.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}, "gru": jnp.ones((3, 8, 8))}
        >>> axes = matrix_axes(params, {"gru": MatrixAxes((0, 1), 2)})
        >>> axes["up"]
        {'bias': None, 'kernel': MatrixAxes(reduction_axis=0, output_axis=1)}
        >>> axes["gru"]
        MatrixAxes(reduction_axis=(0, 1), output_axis=2)
    """
    _, treedef = flatten_by_path(params)
    return treedef.unflatten(axes_by_path(params, overrides).values())


def describe(
    params, overrides=None, *, rank: int | None = None, side: Literal["short", "long"] = "short"
) -> str:
    """A table for people: each leaf's path, shape and view, whether it is projected, and the rule that said so.

    With `rank` also the matrices that are too small for it are dense, as in `assemble`.

    Example:
        >>> print(describe({"q": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}}))
        leaf      shape      b × m × n  axes b | m | n  treatment  why
        q/bias    (2, 4)                                dense      bias or scale
        q/kernel  (8, 2, 4)  1 × 8 × 8  - | 0 | 1,2     projected  attention input
        1 of 2 leaves projected: 64 of 72 parameters (88.9 %).
    """
    rows = [("leaf", "shape", "b × m × n", "axes b | m | n", "treatment", "why")]
    sizes, projected = [], []
    for path, (axes, why, shape) in _decide(params, overrides, strict=True).items():
        sizes.append(math.prod(shape))
        if axes is None:
            rows.append((path, str(shape), "", "", "dense", why))
            continue
        view = MatrixView.of(shape, axes, side)
        folds = (view.batch_axes, view.projected_axes, view.other_axes)
        axis_lists = " | ".join(",".join(map(str, fold)) or "-" for fold in folds)
        columns = (path, str(shape), f"{view.batch} × {view.m} × {view.n}", axis_lists)
        if rank is not None and min(view.m, view.n) <= rank:
            rows.append((*columns, "dense", "min(m, n) <= rank"))
        else:
            rows.append((*columns, "projected", why))
            projected.append(math.prod(shape))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    share = 100 * sum(projected) / max(sum(sizes), 1)  # no parameters: 0 of 0 is 0 %
    counts = f"{len(projected)} of {len(sizes)} leaves projected: {sum(projected):,} of {sum(sizes):,} parameters"
    return "\n".join([*lines, f"{counts} ({share:.1f} %)."])
