"""Which optimizer fits a device: weights, state, gradients and temporaries, counted before anything is allocated."""

import dataclasses
import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

import optax_lowrank
from optax_lowrank import checks
from optax_lowrank.classify import ranks_by_path, views_by_path
from optax_lowrank.report import size_of
from optax_lowrank.tables import Table, Tabular, table
from optax_lowrank.views import flatten_by_path

METHODS = (
    "galore", "fira", "natural_galore", "adarankgrad", "gradnormlorp", "apollo", "low_rank_muon",
)  # fmt: skip
LAYERS = r"(?i)(?:^|/)(?:layers?|blocks?|h)(?:[/_](\d+))?(?:/|$)"


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Bytes of one way to train."""

    method: str
    rank: int | float | None  # None: not a low-rank method
    bits: int | None  # of the state; None: floats
    layerwise: bool
    parameters: int
    state: int
    gradients: int
    temporaries: int
    fits: bool

    @property
    def total(self) -> int:
        """The sum, without activations."""
        return self.parameters + self.state + self.gradients + self.temporaries


@dataclasses.dataclass(frozen=True)
class Plan(Tabular):
    """What `plan` returns; shown as a table, by `str()` and in a notebook."""

    budget: int  # bytes
    rows: tuple[PlanRow, ...]

    @property
    def best(self) -> PlanRow | None:
        """Of the rows that fit: the largest rank (any number before any share), then floats, then whole gradients."""
        rank = lambda row: math.inf if row.rank is None else row.rank
        worth = lambda row: (rank(row), row.bits or 32, not row.layerwise)
        return max((row for row in self.rows if row.fits), key=worth, default=None)

    def _table(self) -> Table:
        head = ("method", "rank", "bits", "step", "weights", "state", "gradients", "temporaries")
        cells = [(*head, "sum, GiB", f"fits {_gib(self.budget)}")]
        for row in self.rows:
            way = "layer-wise" if row.layerwise else "whole"
            sizes = (row.parameters, row.state, row.gradients, row.temporaries, row.total)
            named = (row.method, f"{row.rank or '-'}", f"{row.bits or '-'}", way)
            best = " (best)" if row is self.best else ""
            cells.append((*named, *map(_gib, sizes), f"{'yes' if row.fits else 'no'}{best}"))
        return table(cells, numbers=(1, 2, 4, 5, 6, 7, 8))


def plan(
    params: Any,
    budget: int | str,
    *,
    methods: Mapping[str, Callable[..., optax.GradientTransformation]] | None = None,
    ranks: Iterable[int | float] = (128, 512, 1024),
    bits: Iterable[int | None] = (None, 8),
    layerwise: Iterable[bool] = (False, True),
    activations: int = 0,
    layers: str = LAYERS,
) -> Plan:
    """Method, rank, bits of the state and kind of step for a device, with the bytes of each choice.

    weights + state + gradients + temporaries + activations ≤ budget, where

    - state is `memory_report(tx, params).state`;
    - gradients are as large as the weights, and in a layer-wise step (`layerwise_step`) those of the largest layer and
      of everything around the layers;
    - temporaries are an estimate of the update of the largest leaf, b matrices of (m, n) that are projected to rank r:
      4 m n (the gradient in float32, for a refit of one matrix) + b m n · itemsize (the update)
      + 12 b r n (coordinates, their moments' step, and the step that is lifted; float32).

    Activations are what the model makes of them: give them, or leave room. A compiler's own count of a whole step is
    `jax.jit(step).lower(...).compile().memory_analysis()`.

    Args:
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      budget: bytes, or a number with a unit: "24GB" (10⁹), "80GiB" (2³⁰).
      methods: optimizers by name, each a function of `rank` and `state_bits` or of those of them that it takes; default
        AdamW and the aliases of this package.
      ranks, bits: of those methods that take them.
      layerwise: whether layer by layer; left out where no leaf belongs to a layer.
      activations: bytes.
      layers: pattern of the paths of the layers' leaves. Its group 1 is the number of the layer; leaves where it is
        empty have the layers stacked on axis 0.

    Returns:
      A `Plan`: all rows, in the order of the arguments, and the best of them.

    Raises:
      TypeError, ValueError: `params` are no arrays or shapes; `budget` cannot be read.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> kernel = jax.ShapeDtypeStruct((8, 1024, 4096), jnp.bfloat16)
      >>> choice = ol.plan({"layers": {"kernel": kernel}}, "0.14GB", ranks=(64, 256))
      >>> choice.best.method, choice.best.rank, choice.best.bits, choice.best.layerwise
      ('low_rank_muon', 256, None, True)
    """
    checks.arrays(params)
    size = _parse(budget)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    parameters = sum(map(size_of, jax.tree.leaves(shapes)))
    one_layer, ends, single = _layers(shapes, layers)
    ways = [way for way in layerwise if one_layer or not way]
    bits, ranks = tuple(bits), tuple(ranks)
    rows = []
    for name, make in (_defaults() if methods is None else methods).items():
        takes = inspect.signature(make).parameters
        for rank in ranks if "rank" in takes else (None,):
            for codes in bits if "state_bits" in takes else (None,):
                given = {"rank": rank, "state_bits": codes}
                tx = make(**{key: value for key, value in given.items() if key in takes})
                state = optax_lowrank.memory_report(tx, shapes).state
                for way in ways:
                    gradients = one_layer + ends if way else parameters
                    temporaries = _temporaries(single if way else shapes, rank)
                    sizes = parameters, state, gradients, temporaries
                    fits = sum(sizes) + activations <= size
                    rows.append(PlanRow(name, rank, codes, way, *sizes, fits))
    return Plan(size, tuple(rows))


def _defaults():
    def adamw(state_bits):
        adam = optax.scale_by_adam()
        return adam if state_bits is None else optax_lowrank.quantize_state(adam, state_bits)

    aliases = {name: functools.partial(getattr(optax_lowrank, name), 1.0) for name in METHODS}
    return {"adamw": adamw} | aliases


def _parse(budget) -> int:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*", f"{budget}", re.IGNORECASE)
    if not match:
        raise ValueError(
            f'`budget` must be bytes or a text such as "24GB" or "80GiB", got {checks.shown(budget)}.'
        )
    number, prefix, binary = match.groups()
    return round(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def _layers(shapes, pattern) -> tuple[int, int, Any]:
    """Bytes of the largest layer and of what is in no layer, and the tree with one layer of each stack."""
    leaves, treedef = flatten_by_path(shapes)
    numbered, stacked, ends = Counter(), 0, 0
    for path, x in leaves.items():
        match = re.search(pattern, path)
        if match is None:
            ends += size_of(x)
        elif match[1]:
            numbered[path[: match.start()] + match[1]] += size_of(x)
        else:
            leaves[path] = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            stacked += size_of(leaves[path])
    largest = stacked + max(numbered.values(), default=0)
    return largest, ends, treedef.unflatten(leaves.values())


def _temporaries(shapes, rank) -> int:
    leaves, _, views = views_by_path(shapes)
    matrices = {path: view for path, view in views.items() if view and rank is not None}
    ranks = ranks_by_path(matrices, rank) if matrices else {}

    def of(path, leaf):
        if path not in ranks:
            return size_of(leaf)
        m, n, b = views[path].m, views[path].n, views[path].batch
        return 4 * m * n + size_of(leaf) + 12 * b * ranks[path] * n

    return max((of(*x) for x in leaves.items()), default=0)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
