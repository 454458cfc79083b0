"""Which leaves are matrices, by which axes, and to which rank: the rules, and what users say against them.

From path and shape the rules (the table in `matrix_axes`) say which axes a layer sums over and which it produces.
Three things they take from the tree around a leaf: that it belongs to a layer of Equinox or Haliax, that it is a factor
of an adapter, that its output is the vocabulary of an embedding.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

from optax_lowrank import checks
from optax_lowrank.tables import Table, table
from optax_lowrank.views import (
    MatrixAxes,
    MatrixView,
    Shape,
    belongs_to,
    equal_leaves,
    flatten_by_path,
    sides_of,
)

# ----------------------------------------------------------------------------------------------------------- rules


def _tail(words: str) -> str:
    """A pattern for `words` in the last two components of a path, whatever their case and Linen's `_0`."""
    return rf"(?i:(^|/)({words})(_\d+)?(/[^/]*)?$)"


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


_HEAD = r"([^/]*_)?(lm)?head|([^/]*_)?readout|unembed[^/]*|embed_out|to_vocab|[^/]*logits[^/]*|[^/]*classifier[^/]*"
_POSITION = r"wpe|pe|[^/]*pos(ition(s|al)?)?_?(emb[^/]*|enc|encodings?|table|bias[^/]*)"
_POSITION_LEAF = r"(?i:(^|/)([^/]*_)?(pos|positions?|rel_pos_[hwxy])$)"
_MOE = r"(?i)(?<!shared)(?<!shared_)expert|moe[^/]*/(?!(gate|router)(/|$))([^/]*/)?[^/]*$"
_QKV = r"(query|key|value|q|k|v|kv|qkv)(_proj)?|w[qkv]"
_OUT = r"(out|o)(_proj)?|wo"
_RULES = (  # the first that fits wins; the docstring of `matrix_axes` is this table in words
    _Rule("bias or scale", r"(?i)(^|[/_])(bias|scale)$|(^|/)(b\d*|gamma|beta)$"),
    _Rule("norm", _tail(r"[^/]*norm[^/]*|ln\d*|ln_[^/]*|[^/]*_ln")),
    _Rule("head", _tail(_HEAD)),
    _Rule("position table", f"{_tail(_POSITION)}|{_POSITION_LEAF}"),
    _Rule("embedding", _tail(r"[^/]*embed[^/]*|([^/]*_)?emb|wte")),
    _Rule("fewer than 2 axes", shape=lambda s: len(s) < 2),
    _Rule("kernel", shape=lambda s: len(s) == 2, axes=lambda s: MatrixAxes(0, 1)),
    _Rule(
        "convolution", _tail("[^/]*conv[^/]*"), axes=lambda s: MatrixAxes((*range(len(s) - 1),), -1)
    ),
    _Rule("experts", _MOE, axes=lambda s: MatrixAxes(-2, -1)),
    _Rule(
        "attention input",
        _tail(_QKV),
        lambda s: _has_heads(max(s[:-2]), *s[-2:]),
        lambda s: MatrixAxes(_largest(s[:-2]), (-2, -1)),
    ),
    _Rule(
        "attention output",
        _tail(_OUT),
        lambda s: _has_heads(s[-1], *s[-3:-1]),
        lambda s: MatrixAxes((-3, -2), -1),
    ),
    _Rule("stacked kernels", axes=lambda s: MatrixAxes(_largest(s[:-1]), -1)),
)


class _Decision(NamedTuple):
    axes: MatrixAxes | None
    why: str


def _by_rule(path: str, shape: Shape, known: _Decision | None) -> _Decision:
    """What the rules say of a leaf, the container's word for the axes of what they take for a matrix."""
    rule = next(rule for rule in _RULES if re.search(rule.path, path) and rule.shape(shape))
    axes, why = rule.axes(shape), rule.why
    if known and (axes is not None or known.why == "adapter"):
        axes, why = known
    if axes is None:
        return _Decision(None, why)
    if 0 in shape:
        return _Decision(None, "empty")
    view = MatrixView.of(shape, axes)
    if min(view.m, view.n) == 1:
        return _Decision(None, "vector: one side has size 1")
    return _Decision(axes, why)


# ------------------------------------------------------------------------------------------- the tree around a leaf


def _shape(leaf) -> Shape:
    return tuple(getattr(leaf, "shape", ()))  # an Equinox model has functions among its leaves


def _is_adapter(node) -> bool:
    # `optax.masked` takes leaves away, not keys: the factors are known without their magnitude
    return isinstance(node, Mapping) and set(node) == {"I", "J", "magnitude"}


def _is_equinox_layer(node) -> bool:
    return belongs_to(
        node, "equinox", "Linear", "Conv", "ConvTranspose", "GRUCell", "LSTMCell", "Embedding"
    )


def _is_haliax_layer(node) -> bool:
    return belongs_to(node, "haliax", "Linear", "MoELinear", "Conv", "ConvTranspose", "Embedding")


def _in_haliax_layer(node) -> _Decision:
    """The axes of a weight by their names: `In` and window, `Out`; others, of layers and experts, are batch axes."""
    if belongs_to(node, "haliax", "Embedding"):
        return _Decision(None, "embedding")
    # `haliax` keeps the axes in an array, `marin-haliax` their names
    named = getattr(node.weight, "axis_names", None) or [axis.name for axis in node.weight.axes]

    def places(*specs):  # each one axis, or several, or a dict by name
        axes = [x for spec in specs for x in ((spec,) if hasattr(spec, "name") else spec)]
        return tuple(named.index(getattr(axis, "name", axis)) for axis in axes)

    axes = MatrixAxes(places(node.In, getattr(node, "Spatial", ())), places(node.Out))
    return _Decision(axes, f"Haliax {type(node).__name__}")


def _in_layer(node, name: str, shape: Shape) -> _Decision | None:
    """Axes of a leaf that its container settles, or None."""
    if _is_adapter(node):
        return _Decision(MatrixAxes(-2, -1), "adapter") if name in ("I", "J") else None
    if _is_haliax_layer(node):
        return _in_haliax_layer(node) if name == "weight" else None
    if not name.startswith("weight"):
        return None
    if belongs_to(node, "equinox", "Embedding"):
        return _Decision(None, "embedding")
    output = len(shape) - 2 - getattr(node, "num_spatial_dims", 0)  # (..., out, in, *window)
    if output < 0:
        return None
    why = f"Equinox {type(node).__name__}"
    return _Decision(MatrixAxes((*range(output + 1, len(shape)),), output), why)


def _known(params) -> dict[str, _Decision]:
    """Decisions by path for leaves of layers that are known by their class, and of adapters."""
    is_layer = lambda node: _is_adapter(node) or _is_equinox_layer(node) or _is_haliax_layer(node)
    known = {}
    for path, node in flatten_by_path(params, is_leaf=is_layer)[0].items():
        if is_layer(node):
            for name, leaf in flatten_by_path(node)[0].items():
                decision = _in_layer(node, name, _shape(leaf))
                if decision is not None:
                    known[f"{path}/{name}" if path else name] = decision
    return known


def _heads_by_vocabulary(decisions: dict[str, _Decision], shapes: dict[str, Shape]) -> list[str]:
    """Matrices (d, v) for an embedding (v, d), v > d, where no matrix takes v in.

    A feed-forward layer of width v has a matrix from d to v as well, but then one from v, too.
    """
    tables = {shapes[path] for path, (_, why) in decisions.items() if why == "embedding"}
    views = _views(decisions, shapes, "reduction")
    taken = {view.m for view in views.values()}
    return [
        path
        for path, view in views.items()
        if len(view.shape) == 2
        and view.n > view.m
        and (view.n, view.m) in tables
        and view.n not in taken
    ]


# ------------------------------------------------------------------------------------------------------- overrides


def _is_axes(x) -> bool:
    return x is None or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, paths)) or "none"


def _overridden(paths: Iterable[str], overrides, strict: bool) -> dict[str, _Decision]:
    """What `overrides` say about these paths; silent on the leaves they leave to the rules."""
    if overrides is None:
        return {}
    if _is_axes(overrides):
        return {path: _Decision(overrides, "override") for path in paths}
    if isinstance(overrides, Mapping) and all(
        isinstance(k, str) and _is_axes(v) for k, v in overrides.items()
    ):
        matches = _first_matches(paths, overrides, strict, "overrides")
        return {
            path: _Decision(overrides[key], f"override {key!r}") for path, key in matches.items()
        }
    is_pair = lambda x: type(x) is tuple and bool(x) and all(map(checks.is_integer, x))
    given, _ = flatten_by_path(overrides, is_leaf=lambda x: _is_axes(x) or is_pair(x))
    for path, axes in given.items():
        if not _is_axes(axes):
            wrong = f"the override of leaf {path!r} is {checks.shown(axes)}"
            raise ValueError(f"{wrong}; give MatrixAxes or None, as `MatrixAxes(0, 1)`.")
    missing = [path for path in paths if path not in given]
    extra = [path for path in given if path not in paths] if strict else []
    if missing or extra:
        raise ValueError(
            f"the tree of overrides is not like params: it lacks {_listed(missing)} and adds "
            f"{_listed(extra)}. Give each leaf MatrixAxes or None, or a few a dict {{regex: axes}}."
        )
    return {path: _Decision(given[path], "override") for path in paths}


def _first_matches(
    paths: Iterable[str], patterns: Mapping[str, Any], strict: bool, what: str, kind: str = "leaf"
) -> dict[str, str]:
    """The pattern that speaks for each path: the one that is the path, else the first that is found in it."""
    chosen, used = {}, set()
    for path in paths:
        try:
            matches = [key for key in patterns if key == path or re.search(key, path)]
        except re.error as error:
            raise ValueError(f"{error.pattern!r} is no regular expression: {error}.") from error
        used.update(matches)
        if matches:
            chosen[path] = path if path in patterns else matches[0]
    idle = [key for key in patterns if key not in used]
    if strict and idle:
        raise ValueError(f"{what} {_listed(idle)} match no {kind}. The paths: {_listed(paths)}.")
    return chosen


# ------------------------------------------------------------------------------------------------------- decisions


def _decide(params, overrides, strict: bool) -> tuple[dict[str, _Decision], dict[str, Shape]]:
    """Decisions and shapes by path: what `axes_by_path`, `matrix_axes` and `describe` show a part of."""
    leaves, _ = flatten_by_path(params)
    shapes = {path: _shape(leaf) for path, leaf in leaves.items()}
    chosen = _overridden(leaves, overrides(params) if callable(overrides) else overrides, strict)
    known = _known(params)

    def decide(path, shape):
        axes, why = chosen.get(path) or _by_rule(path, shape, known.get(path))
        if axes is not None:
            sides = sides_of(axes, shape, f"leaf {path!r} of shape {shape}")
            axes = MatrixAxes(*(side[0] if len(side) == 1 else side for side in sides))
        return _Decision(axes, why)

    decisions = {path: decide(path, shape) for path, shape in shapes.items()}
    for path in _heads_by_vocabulary(decisions, shapes):
        if path not in chosen:
            decisions[path] = _Decision(None, "head: its output is a vocabulary")
    return decisions, shapes


def _views(decisions, shapes, side) -> dict[str, MatrixView]:
    """Of the leaves that are matrices."""
    found = {path: axes for path, (axes, _) in decisions.items() if axes is not None}
    return {path: MatrixView.of(shapes[path], axes, side) for path, axes in found.items()}


def axes_by_path(params, overrides=None, *, strict: bool = True) -> dict[str, MatrixAxes | None]:
    """`matrix_axes` as a dict by path, in tree order, axes counted from 0.

    With `strict=False` overrides may speak of leaves that are not in `params`, as they do when `optax.masked` or
    `optax.partition` has taken some away. A leaf's answer does not depend on which other leaves are there, but for a
    head that is known by its vocabulary only: it is a matrix where the embedding is out of sight. The matrices of a
    tree alone are matrices again, as no embedding is among them.
    """
    decisions, _ = _decide(params, overrides, strict)
    return {path: decision.axes for path, decision in decisions.items()}


def views_by_path(
    tree, overrides=None, side: str = "short", *, strict: bool = False
) -> tuple[dict[str, Any], Any, dict[str, MatrixView | None]]:
    """Leaves by path, the treedef, and of each leaf its view, or None where it is dense; see `axes_by_path`."""
    leaves, treedef = flatten_by_path(tree)
    found = axes_by_path(tree, overrides, strict=strict)
    view = lambda path, axes: axes and MatrixView.of(leaves[path].shape, axes, side)
    return leaves, treedef, {path: view(path, axes) for path, axes in found.items()}


def matrix_axes(params, overrides=None):
    """A tree like `params` with the `MatrixAxes` of every leaf that is a matrix, and None (dense) for the others.

    The first rule that fits decides. Names are looked for in the last two components of the path, whatever their case
    and a final `_0`; d and m are the largest of the axes they could be (of equals the last), which is how a layer axis
    L is told from them at scan axis 0 or 1.

    | rule | names | shape | reduction → output |
    |---|---|---|---|
    | adapter | `I`, `J` of a dict of `I`, `J` and `magnitude` (see `adapters`) | (m, n), (b, m, n) | -2 → -1 |
    | bias or scale | ends in `bias`, `*_bias`, `scale`, `*_scale`, `b`, `b1`, `gamma`, `beta` | any | dense |
    | norm | contains `norm`; `ln`, `ln1`, `ln_*`, `*_ln` | any | dense |
    | head | `head`, `*_head`, `lmhead`, `readout`, `*_readout`, `unembed*`, `embed_out`, `to_vocab`, contains \
`logits` or `classifier` | any | dense |
    | position table | `wpe`, `pe`; contains `pos`, `position(s)`, `positional` before `emb*`, `enc`, `encoding`, \
`table`, `bias*`; the leaf itself is `pos`, `*_pos`, `position(s)`, `rel_pos_h`, `rel_pos_w` | any | dense |
    | embedding | contains `embed`; `emb`, `*_emb`, `wte`; the weight of an `Embedding` of Equinox or Haliax | any | \
dense |
    | fewer than 2 axes | any | (), (n,) | dense |
    | Equinox layer | `weight*` of `eqx.nn.Linear`, `Conv*`, `GRUCell`, `LSTMCell` | (out, in), (L, out, in), \
(out, in, ...) | all after out → out |
    | Haliax layer | `weight` of `hnn.Linear`, `MoELinear`, `Conv*` | any | `In`, window → `Out`, by the names of axes |
    | head by vocabulary | any | (d, v) beside an embedding (v, d), v > d, and nothing takes v in | dense |
    | kernel | any | (m, n) | 0 → 1 |
    | convolution | contains `conv` | (..., c_in, c_out) | all others → -1 |
    | experts | `expert` anywhere, not after `shared_`; `moe` above any but `gate`, `router` | (..., m, n) | -2 → -1 |
    | attention input | `query`, `key`, `value`, `q`, `k`, `v`, `kv`, `qkv`, these with `_proj`; `wq`, `wk`, `wv` | \
(d, heads, hd), (L, d, heads, hd), (d, L, heads, hd), (d, 3, heads, hd) | d → (-2, -1) |
    | attention output | `out`, `o`, these with `_proj`; `wo` | (heads, hd, d), (L, heads, hd, d) | (-3, -2) → -1 |
    | stacked kernels | any | (L, m, n), (m, L, n), ... | largest of the others → -1 |

    Attention needs hd < d and heads * hd ≤ 4 d, or it counts as stacked kernels. A matrix with a side of size 1 is a
    vector: dense. Shape cannot settle everything: an attention output stacked at axis 1, (heads, L, hd, d), is taken
    for one at axis 0, layers that outnumber a side for that side, and weights stored (out, in) by other libraries than
    Equinox and Haliax for (in, out). `describe` shows it; an override settles it.

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
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> params = {"up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}, "gru": jnp.ones((3, 8, 8))}
      >>> axes = ol.matrix_axes(params, {"gru": ol.MatrixAxes((0, 1), 2)})
      >>> axes["up"]
      {'bias': None, 'kernel': MatrixAxes(reduction_axis=0, output_axis=1)}
      >>> axes["gru"]
      MatrixAxes(reduction_axis=(0, 1), output_axis=2)
    """
    _, treedef = flatten_by_path(params)
    return treedef.unflatten(axes_by_path(params, overrides).values())


# ----------------------------------------------------------------------------------------------------------- ranks

Rank = int | float | Mapping[str, int | float]
DEFAULT_RANK = 128  # of GaLore, arXiv:2403.03507; also of leaves that no pattern matches


def check_rank(rank: Rank) -> None:
    """Raises for what can be no rank of any leaf: an int below 1, a float outside (0, 1), anything else.

    Raises:
      TypeError, ValueError: naming the value, and the pattern if `rank` is a dict.
    """
    for pattern, value in rank.items() if isinstance(rank, Mapping) else [(None, rank)]:
        where = "" if pattern is None else f" for {pattern!r}"
        is_pattern = pattern is None or isinstance(pattern, str)
        is_int = checks.is_integer(value)
        is_share = not is_int and isinstance(value, Real) and 0 < value < 1
        if not is_pattern or not (is_int or is_share):
            raise TypeError(
                f"`rank` must be an int, got {checks.shown(value)}{where}. Keep it static under "
                "`optax.inject_hyperparams`; a share of the projected side is a float in (0, 1), ranks by leaf are a "
                "dict {regex: int or share}."
            )
        if is_int and value < 1:
            raise ValueError(f"`rank` must be positive, got {value}{where}.")


def ranks_by_path(
    views: Mapping[str, MatrixView], rank: Rank, *, strict: bool = False
) -> dict[str, int]:
    """The rank of every view, at most min(m, n); a matrix is projected if that is less than min(m, n).

    Args:
      views: of the matrices, by path.
      rank: an int; a float in (0, 1), that share of the projected side m, to the nearest multiple of 8 but at least
        8; or a dict `{regex: either}`: the first `re.search` on the path wins, a key that is a path speaks first
        for its leaf, and the others have rank 128.
      strict: refuse patterns that match none of the views.

    Raises:
      TypeError, ValueError: see `check_rank`; a pattern is no regular expression, or matches nothing.

    Example:
      >>> views = {path: MatrixView.of((64, 96), MatrixAxes(0, 1)) for path in ("up", "gate", "down")}
      >>> ranks_by_path(views, {"up": 8, "gate": 0.25})
      {'up': 8, 'gate': 16, 'down': 64}
    """
    check_rank(rank)
    if isinstance(rank, Mapping):
        matches = _first_matches(views, rank, strict, "patterns of `rank`", "matrix")
        rank_of = {path: rank[key] for path, key in matches.items()}
    else:
        rank_of = dict.fromkeys(views, rank)
    return {
        path: min(_absolute(rank_of.get(path, DEFAULT_RANK), view.m), view.m, view.n)
        for path, view in views.items()
    }


def _absolute(rank: int | float, m: int) -> int:
    return int(rank) if checks.is_integer(rank) else max(8, 8 * round(float(rank) * m / 8))


# -------------------------------------------------------------------------------------------------------- describe


def describe(
    params,
    overrides=None,
    *,
    rank: Rank | None = None,
    side: Literal["short", "long", "both"] = "short",
) -> Table:
    """A table for people: each leaf's path, shape and view, whether it is projected, and the rule that said so.

    The rules are those of `matrix_axes`. With `rank` also the matrices that are too small for it are dense, as in
    every optimizer, and ranks that differ between leaves are shown.

    Args:
      params: a tree of anything with a shape, boxed or not.
      overrides: see `matrix_axes`.
      rank: None, an int, a float in (0, 1) (that share of the projected side, to a multiple of 8), or a dict
        `{regex: int | float}`; leaves that no pattern matches have rank 128. Of a share, that of the shorter side
        says whether a matrix is too small.
      side: which side is projected; `m` is its size.

    Returns:
      Lines of text, an HTML table in a notebook: one line a leaf, or a group of leaves (`layers/*/kernel`) with their
      count where paths differ only in numbers, and the share of parameters that are projected.

    Raises:
      TypeError, ValueError: see `matrix_axes`; `rank` is no rank, or a pattern of it matches no matrix.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> print(ol.describe({"q": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}}))
      leaf      shape      b × m × n  axes b | m | n  treatment  why
      q/bias    (2, 4)                                dense      bias or scale
      q/kernel  (8, 2, 4)  1 × 8 × 8  - | 0 | 1,2     projected  attention input
      1 of 2 leaves projected: 64 of 72 parameters (88.9 %).
    """
    if hasattr(params, "update") and hasattr(params, "init"):
        raise TypeError("`params` must be parameters, got an optimizer: give `params, rank=...`.")
    decisions, shapes = _decide(params, overrides, strict=True)
    # optimizers look at the shorter side first
    views, short = (_views(decisions, shapes, which) for which in (side, "short"))
    of = lambda views: {} if rank is None else ranks_by_path(views, rank, strict=True)
    ranks, least = of(views), of(short)
    lines, projected = {}, []
    for path, (_, why) in decisions.items():
        treatment = "dense"
        if path in views:
            if least.get(path, 0) == short[path].m:
                why = "min(m, n) <= rank"
            else:
                alike = rank is None or checks.is_integer(rank)
                treatment = "projected" if alike else f"rank {ranks[path]}"
                projected.append(path)
        lines[path] = (str(shapes[path]), *_geometry(views.get(path)), treatment, why)
    groups = equal_leaves(lines, lines.get)
    rows = [("leaf", "count", "shape", "b × m × n", "axes b | m | n", "treatment", "why")]
    rows += [(name, f"{len(paths):,}", *lines[paths[0]]) for name, paths in groups.items()]
    numbers = [1]
    if len(groups) == len(lines):
        rows, numbers = [(name, *line) for name, _, *line in rows], []
    total, part = (sum(math.prod(shapes[path]) for path in paths) for paths in (shapes, projected))
    share = 100 * part / max(total, 1)  # no parameters: 0 of 0 is 0 %
    counts = f"{len(projected)} of {len(shapes)} leaves projected: {part:,} of {total:,} parameters"
    return table(rows, numbers, foot=f"{counts} ({share:.1f} %).")


def _geometry(view: MatrixView | None) -> tuple[str, str]:
    if view is None:
        return "", ""
    axes = (view.batch_axes, view.projected_axes, view.other_axes)
    axis_lists = " | ".join(",".join(map(str, side)) or "-" for side in axes)
    return f"{view.batch} × {view.m} × {view.n}", axis_lists
