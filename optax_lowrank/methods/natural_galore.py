"""Natural GaLore: GaLore with the coordinates preconditioned by the inverse empirical Fisher of their last few values.

Das, arXiv:2410.16029, section 3, with g = vec(R) and H = [g_k, g_{k−1}, …], `history` columns with the current one:

    F = λI + H Hᵀ,   g̃ = F⁻¹ g_k = H (λI + HᵀH)⁻¹ e_k,   N = Adam(g̃)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_lowrank import checks
from optax_lowrank.linalg import push_through_weights
from optax_lowrank.options import Options, alias
from optax_lowrank.rules import OfRule, Rule, Turn, chained, is_finite, of_rule, wide
from optax_lowrank.walls import entry, loop, put, when


class WoodburyFisherState(NamedTuple):
    """State of the Fisher of one matrix."""

    history: jax.Array  # (s, r, n), the last s gradients; rotated or cleared on refresh
    row_scale: jax.Array | None  # (s, r, 1), unit of the codes of an int8 history
    gram: jax.Array  # (s, s), HᵀH; one new row and column a step, rebuilt on refresh


def scale_by_woodbury_fisher(
    history: int = 4,
    damping: jax.typing.ArrayLike = 1e-3,
    relative_damping: bool = False,
    history_dtype: Any = None,
    on_refresh: Literal["rotate", "clear"] = "rotate",
    preserve_norm: bool = False,
    batch_axes: int = 0,
) -> OfRule:
    """Multiplies each gradient by the inverse of the damped empirical Fisher of its last few values.

    g̃ = (λI + H Hᵀ)⁻¹ g_k = H (λI + HᵀH)⁻¹ e_k, with H the last `history` gradients as columns, g_k among them. The
    Gram matrix HᵀH lives in the state, so that a step reads H twice: once for its new row, once for the result. A slot
    that is still empty is a zero column, which changes nothing: the start-up is exact.

    Works on any tree of arrays; inside `low_rank` the history follows the basis.

    Args:
      history: s ≥ 1, stored gradients with the current one: s floats for each number in the gradient, where Adam
        keeps two. (The paper claims no memory.)
      damping: λ ≥ 0, in units of a squared gradient norm; below about 1e-6 of the mean of the stored ‖g‖² (float32)
        it is raised to that, since repeated gradients would make the Gram matrix singular.
      relative_damping: count λ in units of the mean of the stored ‖g‖² instead, so that it has no scale.
      history_dtype: dtype of the stored gradients: default theirs; `jnp.bfloat16`; or `jnp.int8`, one scale a row.
      on_refresh: what happens to H when the basis changes: "rotate", H ← Q H, or "clear".
      preserve_norm: scale g̃ back to ‖g‖, so that the Fisher turns the gradient and nothing else. Without it ‖g̃‖ goes
        like 1 / ‖g‖ where λ is small or relative, and Adam, whose second moment lags, takes steps of the wrong size.
      batch_axes: how many leading axes of each leaf count matrices with a Fisher of their own.

    Returns:
      A transformation with updates of the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: history < 1, damping < 0, `history_dtype` no dtype of floats or int8, `on_refresh` unknown;
        an int8 history of a scalar (`init`).

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.scale_by_woodbury_fisher(history=2, damping=1.0)
      >>> g = jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> bool(jnp.allclose(updates, g / (1.0 + 25.0)))
      True

    Reference: Das, arXiv:2410.16029, equations 4 to 6, whose printed forms lose all digits in float32. The Fisher is
      a sum, as there, not a mean. The authors' code keeps H in the old coordinates after a refresh.
    """
    if not checks.is_integer(history) or history < 1:
        raise ValueError(
            f"`history` counts stored gradients with the current one: an int, at least 1, got {checks.shown(history)}."
        )
    checks.number("damping", damping, 0)
    checks.dtype("history_dtype", history_dtype, jnp.int8)
    if on_refresh not in ("rotate", "clear"):
        raise ValueError(f'`on_refresh` must be "rotate" or "clear", got {on_refresh!r}.')
    rule = _Fisher(history, damping, relative_damping, history_dtype, on_refresh, preserve_norm)
    # the step leaves its state alone where a gradient is bad
    keep = lambda finite, new, old: new
    return of_rule(Rule(rule.init, rule.turn, rule.step, keep=keep), batch_axes)


@dataclasses.dataclass(frozen=True)
class _Fisher:
    """The rule of `scale_by_woodbury_fisher`, whose arguments these are."""

    history: int
    damping: jax.typing.ArrayLike
    relative_damping: bool
    dtype: Any
    on_refresh: str
    preserve_norm: bool

    @property
    def in_codes(self):
        return self.dtype is not None and jnp.issubdtype(self.dtype, jnp.integer)

    def encode(self, g, dtype):
        if not self.in_codes:
            return g.astype(dtype), None
        unit = jnp.max(jnp.abs(g), axis=-1, keepdims=True) / 127
        return jnp.round(g / jnp.where(unit > 0, unit, 1)).astype(dtype), unit  # a zero row: code 0

    def decode(self, stored, unit):
        return stored.astype(wide(stored)) if unit is None else stored.astype(unit.dtype) * unit

    def init(self, R):
        if self.in_codes and R.ndim == 0:
            raise ValueError(
                f"`history_dtype={jnp.dtype(self.dtype).name}` keeps one scale a row, and a leaf has no axis for "
                "rows. Use jnp.bfloat16, or keep scalars away with `optax.masked`."
            )
        shape = (self.history, *R.shape)
        return WoodburyFisherState(
            history=jnp.zeros(shape, self.dtype or R.dtype),
            row_scale=jnp.zeros((*shape[:-1], 1), R.dtype) if self.in_codes else None,
            gram=jnp.zeros((self.history, self.history), R.dtype),
        )

    def turn(self, state, turn: Turn):
        if self.on_refresh == "clear":
            return jax.tree.map(jnp.zeros_like, state)

        # one stored gradient after the other, as XLA for TPUs takes ten times as long to compile products of stacks
        def rotate(i, stored):
            g = turn(self.decode(*entry(stored, i)))
            return put(stored, i, self.encode(g, state.history.dtype))

        def products(i, gram):
            row = _inner(H, self.decode(*entry(stored, i))[None])[:, 0]
            return put(gram, i, row.astype(gram.dtype))

        stored = loop(self.history, rotate, (state.history, state.row_scale))
        H = self.decode(*stored)
        return WoodburyFisherState(*stored, loop(self.history, products, state.gram))

    def step(self, R, columns, state, *, count, finite=None, **extra):
        del extra
        if finite is None:  # alone: what is not passes, and leaves the state alone
            finite = is_finite(R)
            out, c, state = self.step(R, columns, state, count=count, finite=finite)
            return jnp.where(finite, out, R), c, state
        slot, code = count % self.history, self.encode(R, state.history.dtype)

        def put(old, new, axis=0):
            kept = lax.dynamic_index_in_dim(old, slot, axis, keepdims=False)
            return lax.dynamic_update_index_in_dim(old, jnp.where(finite, new, kept), slot, axis)

        push = lambda stored: jax.tree.map(put, stored, code)
        stored, unit = when(count >= 0, push, (state.history, state.row_scale))
        H, g = self.decode(stored, unit), self.decode(*code)
        row = _inner(H, g[None])[:, 0]
        gram = put(put(state.gram, row), row, axis=1)
        weights = _weights(gram, slot, self.damping, self.relative_damping)
        # a sum of s terms is one pass over H; a product of a row with a matrix is several times slower
        out = sum(weights[i] * H[i] for i in range(self.history))
        if self.preserve_norm:
            norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
            out = out * norm(R) / jnp.where(norm(out) > 0, norm(out), 1)  # out = 0 where R = 0
        return out.astype(R.dtype), None, WoodburyFisherState(stored, unit, gram)


def _inner(H, G):
    """⟨H_i, G_j⟩; flattened, sharded arrays would be gathered."""
    axes = tuple(range(1, H.ndim))
    return jnp.tensordot(H, G, (axes, axes), precision=lax.Precision.HIGHEST)


def _weights(gram, slot, damping, relative):
    """Push-through weights (λI + HᵀH)⁻¹ e, e the slot of the current gradient."""
    s = gram.shape[-1]
    squares = jnp.diagonal(gram)
    mean = jnp.sum(squares) / jnp.maximum(jnp.sum(squares > 0), 1).astype(gram.dtype)
    damping = jnp.asarray(damping, gram.dtype)
    lam = jnp.maximum(damping * mean if relative else damping, 8 * jnp.finfo(gram.dtype).eps * mean)
    lam = jnp.where(lam > 0, lam, 1)  # nothing stored: the result is 0 whatever λ
    return push_through_weights(gram, jax.nn.one_hot(slot, s, dtype=gram.dtype), lam)


@alias()
def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    history: int = 4,
    damping: jax.typing.ArrayLike = 1e-3,
    relative_damping: bool = False,
    history_dtype: Any = None,
    preserve_norm: bool = False,
    precondition: Literal["gradient", "step"] = "gradient",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Natural GaLore: GaLore whose coordinates pass through `scale_by_woodbury_fisher` before Adam.

    W ← W − η (α P N + λ_d W) with N = Adam((λI + H Hᵀ)⁻¹ PᵀG). State: that of `galore` and `history` · r · n numbers
    of `history_dtype` a matrix.

    Args:
      learning_rate: η, a number or a schedule.
      **options: see `Options`.
      history, damping, relative_damping, history_dtype, preserve_norm: of `scale_by_woodbury_fisher`. The history
        always follows the basis.
      precondition: the "gradient", before Adam, as in the paper; or Adam's "step", whose history is then kept.

    Returns:
      A transformation. Updates have the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: an option is wrong; dimension numbers do not fit (`init`).

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((2048, 5461), jnp.float32)}
      >>> report = ol.memory_report(ol.natural_galore(0.01, rank=512), shapes)
      >>> round(report.arrays / report.adamw, 2)
      0.8

    Reference: Das, arXiv:2410.16029, Algorithm 1. The authors' code projects both sides and keeps 20 columns of r × r.
    """
    if precondition not in ("gradient", "step"):
        raise ValueError(f'`precondition` must be "gradient" or "step", got {precondition!r}.')
    options = Options(**options)
    fisher = scale_by_woodbury_fisher(
        history, damping, relative_damping, history_dtype, preserve_norm=preserve_norm
    )
    parts = [fisher, options.moments()]
    rule = chained(*(parts if precondition == "gradient" else reversed(parts)))
    return options.optimizer(learning_rate, options.projected(rule, scale=options.scale))
