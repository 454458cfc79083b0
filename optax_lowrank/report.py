"""What an optimizer state holds: diagnostics of the bases, bytes of everything."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowrank import checks
from optax_lowrank.low_rank import LowRankState, low_rank_states
from optax_lowrank.refit import TwoSided
from optax_lowrank.refresh import Statistics, positions
from optax_lowrank.tables import Table, Tabular, table
from optax_lowrank.views import equal_leaves, flatten_by_path, owned_leaves


class LeafDiagnostics(NamedTuple):
    """How the basis of one leaf is doing; (b,) arrays, one entry a matrix."""

    rank: jax.Array  # int32, active columns of the basis; -1 where nothing of it is stored
    captured_energy: jax.Array  # float32, ‖PᵀG‖² / ‖G‖² at the last refit
    steps_since_refresh: jax.Array  # int32, -1 where there is no basis yet
    skips: jax.Array  # int32, steps whose gradient was not finite, or no use for a due refit


class Diagnostics(Tabular, dict[str, LeafDiagnostics]):
    """What `diagnostics` returns: a dict by path, shown as a table by `str()` and in a notebook; a pytree."""

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Flat names and plain floats, as trackers of experiments take them.

        - W&B: `wandb.log(diagnostics(state).scalars("optimizer/"), step=step)`
        - TensorBoard: `for name, x in diagnostics(state).scalars().items(): writer.add_scalar(name, x, step)`

        Args:
          prefix: put before each name.

        Returns:
          `path/rank`, `path/captured_energy`, `path/steps_since_refresh` and `path/skips` of every leaf, and of all
          matrices together as `all/rank`, ...: means over the matrices, of `skips` the sum. What is not known of any
          of them has no entry: the rank of a basis that is not stored, and all but `skips` before the first refit.

        Example:
          >>> import jax.numpy as jnp, optax_lowrank as ol
          >>> tx = ol.galore(1e-3, rank=2)
          >>> params = {"layers": jnp.stack([jnp.eye(8)] * 3)}
          >>> _, state = tx.update(params, tx.init(params), params)
          >>> scalars = ol.diagnostics(state).scalars("optimizer/")
          >>> scalars["optimizer/layers/rank"], scalars["optimizer/all/skips"]
          (2.0, 0.0)
        """
        measured = _known(self)
        parts = {path: [leaf] for path, leaf in measured.items()}
        parts |= {"all": [*measured.values()]} if measured else {}
        found = {}
        for path, leaves in parts.items():
            for field, values in _together(leaves)._asdict().items():
                if values.size:
                    of_all = values.sum() if field == "skips" else values.mean()
                    found[f"{prefix}{path}/{field}" if path else prefix + field] = float(of_all)
        return found

    def _table(self) -> Table:
        measured = _known(self)
        rows = [("leaf", "matrices", "rank", "captured energy", "steps since refresh", "skips")]
        for name, paths in equal_leaves(measured).items():
            of = _together(measured[path] for path in paths)
            ranges = [_range(values) for values in of[:3]]
            rows.append((name, f"{of.skips.size:,}", *ranges, f"{of.skips.sum():,}"))
        return table(rows, numbers=range(1, 6))


jax.tree_util.register_pytree_with_keys(
    Diagnostics,
    lambda x: ([(jax.tree_util.DictKey(path), leaf) for path, leaf in x.items()], tuple(x)),
    lambda paths, leaves: Diagnostics(zip(paths, leaves, strict=True)),
)


def _known(found: Diagnostics) -> dict[str, LeafDiagnostics]:
    """What is known of each matrix, on the host."""
    known = {}
    for path, leaf in jax.device_get(found).items():
        fields = LeafDiagnostics(*map(np.ravel, leaf))
        fitted = fields.steps_since_refresh >= 0
        which = (fields.rank >= 0) & fitted, fitted, fitted, np.ones_like(fitted)
        known[path] = LeafDiagnostics(*(x[w] for x, w in zip(fields, which, strict=True)))
    return known


def _together(leaves: Iterable[LeafDiagnostics]) -> LeafDiagnostics:
    return LeafDiagnostics(*map(np.concatenate, zip(*leaves, strict=True)))


def _range(values) -> str:
    """`8`, `8 to 32`, or `-` for nothing."""
    shown = [f"{x:.3f}" if isinstance(x, np.floating) else f"{x:,}" for x in np.sort(values)]
    if not shown:
        return "-"
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def diagnostics(state) -> Diagnostics:
    """Rank, captured energy, age and skips of every basis in an optimizer state.

    Args:
      state: any tree that has `LowRankState`s in it: through `chain`, `partition`, `MultiSteps`,
        `inject_hyperparams`, `nnx.Optimizer`. May be traced.

    Returns:
      Dict by path of the leaf, shown as a table; of a two-sided projection the first basis. Its `scalars()` are
      for W&B and TensorBoard.

    Raises:
      TypeError: `state` is not that of an optimizer.
      ValueError: it is a stack of states, as of `layerwise_step`.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.galore(1e-3, rank=2)
      >>> params = {"kernel": jnp.eye(8)}
      >>> _, state = tx.update({"kernel": jnp.eye(8)}, tx.init(params), params)
      >>> report = ol.diagnostics(state)["kernel"]
      >>> report.rank.tolist(), round(float(report.captured_energy[0]), 2)
      ([2], 0.25)
    """
    is_state = lambda x: hasattr(x, "_fields") and not hasattr(x, "init")
    if not any(map(is_state, jax.tree.leaves(state, is_leaf=is_state))):
        checks.state(state, LowRankState)
    found = Diagnostics()
    for x in low_rank_states(state):
        # a leaf at a time, since wrappers such as nnx box the arrays
        stats, (count,) = Statistics(*jax.tree.leaves(x.stats)), jax.tree.leaves(x.count)
        if count.ndim:
            raise ValueError(f"`state` is a stack of {len(count)}: `jax.vmap(diagnostics)(state)`.")
        batch = {path: _batch(path, leaf) for path, leaf in x.leaves.items()}
        for path, place in positions(batch).items():
            last_fit = stats.last_fit[place]
            found[path] = LeafDiagnostics(
                rank=_active(first_basis(x.leaves[path].basis), last_fit),
                captured_energy=stats.captured[place],
                steps_since_refresh=jnp.where(last_fit < 0, -1, count - 1 - last_fit),
                skips=stats.skips[place],
            )
    return found


def first_basis(stored) -> Any:
    """The last of the arrays (b, ·, r) that a store keeps of the basis P, in which unused columns are zero, or None."""
    arrays = jax.tree.leaves(stored.P if isinstance(stored, TwoSided) else stored)
    return arrays[-1] if arrays else None


def _active(basis, last_fit):
    if basis is None:
        return jnp.full_like(last_fit, -1)
    return jnp.sum(used_columns(basis) & (last_fit >= 0)[:, None], axis=1, dtype=jnp.int32)


def used_columns(basis: jax.Array) -> jax.Array:
    """Which columns of a basis (b, ·, r) are used, (b, r) bool; a DCT keeps their numbers, −1 for none."""
    is_number = jnp.issubdtype(basis.dtype, jnp.integer)
    return jnp.any(basis >= 0 if is_number else basis != 0, axis=1)


def _batch(path, leaf):
    arrays = jax.tree.leaves(leaf)
    if not arrays:
        raise ValueError(
            f"leaf {path!r} keeps no arrays that tell of how many matrices it is a stack."
        )
    return len(arrays[0])


class GroupMemory(NamedTuple):
    """Bytes of the leaves of one shape and treatment whose paths differ only in numbers."""

    leaves: int
    projected: bool
    parameters: int
    arrays: int  # optimizer state that grows with the parameters
    adamw: int  # what `optax.adamw` would keep


@dataclasses.dataclass(frozen=True)
class MemoryReport(Tabular):
    """Bytes, exact, of parameters and optimizer state; shown as a table, by `str()` and in a notebook."""

    groups: dict[str, GroupMemory]  # by path, numbers in which leaves differ replaced by *
    counters: int  # step counts, statistics, norms: everything that is at most one number a matrix

    @property
    def parameters(self) -> int:
        """Bytes of the parameters."""
        return sum(group.parameters for group in self.groups.values())

    @property
    def gradients(self) -> int:
        """Bytes of the gradients: those of the parameters."""
        return self.parameters

    @property
    def arrays(self) -> int:
        """Bytes of bases, moments and all other optimizer state but `counters`."""
        return sum(group.arrays for group in self.groups.values())

    @property
    def state(self) -> int:
        """Bytes of the whole optimizer state."""
        return self.arrays + self.counters

    @property
    def adamw(self) -> int:
        """Bytes of the state of `optax.adamw` on the same parameters."""
        return sum(group.adamw for group in self.groups.values())

    def _table(self) -> Table:
        size = lambda n: f"{n:,}"
        percent = lambda n, of: f"{100 * n / of:.1f} %" if of else "-"
        rows = [("leaves", "", "count", "parameters", "optimizer state", "AdamW's", "ratio")]
        for name, g in self.groups.items():
            kind = "projected" if g.projected else "dense"
            sizes = map(size, (g.leaves, g.parameters, g.arrays, g.adamw))
            rows.append((name, kind, *sizes, percent(g.arrays, g.adamw)))
        sizes = map(size, (self.parameters, self.state, self.adamw))
        rows += [
            ("counters and statistics", "", "", "", size(self.counters), "", ""),
            ("total bytes", "", "", *sizes, percent(self.state, self.adamw)),
            ("gradients", "", "", size(self.gradients), "", "", ""),
        ]
        return table(rows, numbers=range(2, 7))


def memory_report(tx: optax.GradientTransformation, params, state: Any = None) -> MemoryReport:
    """Bytes of an optimizer's state, leaf group by leaf group, without allocating any of it.

    Args:
      tx: any Optax transformation.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      state: a state to measure, a compacted one for example; default what `tx.init` would make.

    Returns:
      A `MemoryReport`. Its arrays are those in which the state has more than one number a matrix; all others count as
      `counters`.

    Raises:
      TypeError: `tx` is no transformation.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
      >>> report = ol.memory_report(ol.galore(1e-3, rank=256), shapes)
      >>> report.arrays == 4 * (1024 * 256 + 2 * 4096 * 256), report.adamw == 4 * 2 * 1024 * 4096
      (True, True)
    """
    checks.transformation("tx", tx, "The order is `memory_report(tx, params)`.")
    if state is None:
        state = jax.eval_shape(tx.init, params)
    leaves, _ = flatten_by_path(params)
    bases = {path for x in low_rank_states(state) for path in x.leaves}
    arrays, counters = dict.fromkeys(leaves, 0), 0
    for _, x, path in owned_leaves(state, params):
        if path is None or (path in bases and x.ndim < 2):
            counters += size_of(x)
        else:
            arrays[path] += size_of(x)
    alike = lambda path: (leaves[path].shape, leaves[path].dtype, path in bases)
    groups = {}
    for name, paths in equal_leaves(leaves, alike).items():
        leaf, count = leaves[paths[0]], len(paths)
        moments = jax.tree.leaves(jax.eval_shape(optax.scale_by_adam().init, leaf)[1:])
        groups[name] = GroupMemory(
            leaves=count,
            projected=paths[0] in bases,
            parameters=count * size_of(leaf),
            arrays=sum(arrays[path] for path in paths),
            adamw=count * sum(map(size_of, moments)),
        )
    return MemoryReport(groups, counters)


def size_of(x) -> int:
    """Bytes of an array, or of a shape."""
    return x.size * x.dtype.itemsize
