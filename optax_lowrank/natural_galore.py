"""Natural GaLore: GaLore with the coordinates preconditioned by the inverse empirical Fisher of their last few values.

Das, arXiv:2410.16029, section 3, with g = vec(R) and H = [g_k, g_{k−1}, …], `history` columns with the current one:

    F = λI + H Hᵀ,   g̃ = F⁻¹ g_k,   N = Adam(g̃)
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_lowrank.accumulate import accumulated
from optax_lowrank.assemble import assemble
from optax_lowrank.bases import basis_store
from optax_lowrank.fits import Fit, randomized_svd
from optax_lowrank.linalg import matmul, push_through_weights
from optax_lowrank.low_rank import low_rank
from optax_lowrank.moments import turns
from optax_lowrank.quantize import StateBits, adam_moments
from optax_lowrank.refresh import Policy, as_policy, in_windows


class WoodburyFisherState(NamedTuple):
    """State of `scale_by_woodbury_fisher`; trees like the updates, batch axes first."""

    count: jax.Array  # () int32, updates so far; count mod s is the next slot
    history: Any  # (b, s, r, n), the last s gradients; rotated or cleared on refresh
    row_scale: Any  # (b, s, r, 1) float32, unit of the codes of an int8 history; None otherwise
    gram: Any  # (b, s, s), HᵀH; one new row and column a step, rebuilt on refresh


def scale_by_woodbury_fisher(
    history: int = 4,
    damping: jax.typing.ArrayLike = 1e-3,
    relative_damping: bool = False,
    history_dtype: Any = None,
    on_refresh: Literal["rotate", "clear"] = "rotate",
    preserve_norm: bool = False,
    batch_axes: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each gradient by the inverse of the damped empirical Fisher of its last few values.

    g̃ = (λI + H Hᵀ)⁻¹ g_k = H (λI + HᵀH)⁻¹ e_k, with H the last `history` gradients as columns, g_k among them. The
    Gram matrix HᵀH lives in the state, so that a step reads H twice: once for its new row, once for the result. A slot
    that is still empty is a zero column, which changes nothing: the start-up is exact.

    Works on any tree of arrays; inside `low_rank` it takes `rotation` and `refreshed`, which change its coordinates.

    Args:
      history: s ≥ 1, stored gradients with the current one: s floats for each number in the gradient, where Adam
        keeps two. (The paper claims no memory.)
      damping: λ > 0, in units of a squared gradient norm; below about 1e-6 of the mean of the stored ‖g‖² (float32)
        it is raised to that, since repeated gradients would make the Gram matrix singular.
      relative_damping: count λ in units of the mean of the stored ‖g‖² instead, so that it has no scale.
      history_dtype: dtype of the stored gradients: default theirs; `jnp.bfloat16`; or `jnp.int8`, one scale a row.
      on_refresh: what happens to H when the basis changes: "rotate", H ← Q H, or "clear".
      preserve_norm: scale g̃ back to ‖g‖, so that the Fisher turns the gradient and nothing else. Without it ‖g̃‖ goes
        like 1 / ‖g‖ where λ is small or relative, and Adam, whose second moment lags, takes steps of the wrong size.
      batch_axes: how many leading axes of each leaf count matrices with a Fisher of their own; inside `low_rank`: 1.

    Returns:
      A transformation with updates of the gradients' shapes and dtypes.

    Raises:
      ValueError: history < 1, damping < 0, `on_refresh` unknown; an int8 history of a scalar (`init`).

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
    if isinstance(history, int) and history < 1:
        raise ValueError(
            f"`history` counts stored gradients with the current one: at least 1, got {history}."
        )
    if isinstance(damping, (int, float)) and damping < 0:
        raise ValueError(f"`damping` must not be negative, got {damping}.")
    if on_refresh not in ("rotate", "clear"):
        raise ValueError(f'`on_refresh` must be "rotate" or "clear", got {on_refresh!r}.')
    in_codes = history_dtype is not None and jnp.issubdtype(history_dtype, jnp.integer)

    def init(params):
        s = int(history)
        if in_codes and any(p.ndim <= batch_axes for p in jax.tree.leaves(params)):
            raise ValueError(
                f"`history_dtype={jnp.dtype(history_dtype).name}` keeps one scale a row, and a leaf has no axis for "
                "rows. Use jnp.bfloat16, or keep scalars away with `optax.masked`."
            )
        shape = lambda p: (*p.shape[:batch_axes], s, *p.shape[batch_axes:])
        wide = lambda p: jnp.promote_types(p.dtype, jnp.float32)
        return WoodburyFisherState(
            count=jnp.zeros([], jnp.int32),
            history=jax.tree.map(lambda p: jnp.zeros(shape(p), history_dtype or p.dtype), params),
            row_scale=jax.tree.map(lambda p: jnp.zeros((*shape(p)[:-1], 1), wide(p)), params)
            if in_codes
            else None,
            gram=jax.tree.map(lambda p: jnp.zeros((*p.shape[:batch_axes], s, s), wide(p)), params),
        )

    def update(updates, state, params=None, **extra):
        del params
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=optax.safe_increment(state.count))
        encode, decode = (_to_codes, _from_codes) if in_codes else (_to_float, _from_float)
        scales = state.row_scale if in_codes else jax.tree.map(lambda _: None, updates)

        def push(g, stored, unit, gram, turn):
            if turn is not None:
                stored, unit, gram = _carried(turn, on_refresh, encode, decode, stored, unit, gram)
            slot = state.count % stored.shape[batch_axes]
            code = encode(g, stored.dtype)
            put = lambda old, new: lax.dynamic_update_index_in_dim(old, new, slot, batch_axes)
            # Always true: a branch is a wall for XLA, which otherwise pushes into a copy of H for each reader of H.
            stored, unit = lax.cond(
                state.count >= 0,
                lambda old: jax.tree.map(put, old, code),
                lambda old: old,
                (stored, unit),
            )
            H, column = _columns(decode(stored, unit), batch_axes), decode(*code)
            row = matmul(H, column.reshape(*H.shape[:batch_axes], -1, 1))[..., 0]
            gram = lax.dynamic_update_index_in_dim(gram, row, slot, batch_axes)
            gram = lax.dynamic_update_index_in_dim(gram, row, slot, batch_axes + 1)
            return stored, unit, gram

        leaves, treedef = jax.tree.flatten(updates)
        columns = (state.history, scales, state.gram, turns(updates, extra))
        pushed = [
            push(g, *rest)
            for g, *rest in zip(leaves, *map(treedef.flatten_up_to, columns), strict=True)
        ]
        weights = _weights([gram for *_, gram in pushed], state.count, damping, relative_damping)
        out = [
            _combination(w, decode(stored, unit), batch_axes)
            for w, (stored, unit, _) in zip(weights, pushed, strict=True)
        ]
        if preserve_norm:
            out = [_with_norm_of(g, x, batch_axes) for g, x in zip(leaves, out, strict=True)]
        out = [x.astype(g.dtype) for g, x in zip(leaves, out, strict=True)]
        stored, unit, gram = (treedef.unflatten(column) for column in zip(*pushed, strict=True))
        return treedef.unflatten(out), WoodburyFisherState(
            optax.safe_increment(state.count), stored, unit if in_codes else None, gram
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _columns(stored, batch_axes):
    """(b, s, r, n) as (b, s, d): Hᵀ, the stored gradients in rows."""
    return stored.reshape(*stored.shape[: batch_axes + 1], -1)


def _combination(w, H, batch_axes):
    """H w. A sum of s terms is one pass over H; as a product of a row with a matrix it is several times slower."""
    column = lambda i: lax.index_in_dim(H, i, batch_axes, keepdims=False)
    weight = lambda i: jnp.expand_dims(w[..., i], range(batch_axes, H.ndim - 1))
    return sum(weight(i) * column(i) for i in range(H.shape[batch_axes]))


def _with_norm_of(g, x, batch_axes):
    norm = lambda y: jnp.sqrt(
        jnp.sum(jnp.square(y), axis=tuple(range(batch_axes, y.ndim)), keepdims=True)
    )
    return x * norm(g) / jnp.where(norm(x) > 0, norm(x), 1)  # x = 0 where g = 0


def _weights(grams, count, damping, relative):
    """Push-through weights of every matrix of every leaf, from one batched Cholesky factorization.

    One, because several independent batched ones in a program can deadlock XLA's thread pool on a CPU.
    """
    s = grams[0].shape[-1]
    gram = jnp.concatenate([g.reshape(-1, s, s) for g in grams])
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    stored = jnp.maximum(jnp.sum(squares > 0, axis=-1), 1)
    mean = jnp.sum(squares, axis=-1) / stored
    lam = jnp.maximum(damping * mean if relative else damping, 8 * jnp.finfo(gram.dtype).eps * mean)
    lam = jnp.where(lam > 0, lam, 1)  # nothing stored: the result is 0 whatever λ
    e = jnp.broadcast_to(jax.nn.one_hot(count % s, s, dtype=gram.dtype), (gram.shape[0], s))
    w = push_through_weights(gram, e, lam)
    ends = [sum(g.size // s**2 for g in grams[: i + 1]) for i in range(len(grams))]
    return [
        part.reshape(g.shape[:-1]) for part, g in zip(jnp.split(w, ends[:-1]), grams, strict=True)
    ]


def _carried(turn, on_refresh, encode, decode, stored, unit, gram):
    """The history in new coordinates, inside `low_rank`: leaves are (b, s, r, n)."""

    def rule(turn, *arrays):
        if on_refresh == "clear":
            return jax.tree.map(jnp.zeros_like, arrays)
        stored, unit = (arrays[0], None) if len(arrays) == 2 else arrays[:2]
        rotated = jax.vmap(turn, in_axes=1, out_axes=1)(decode(stored, unit))
        code, code_unit = encode(rotated, stored.dtype)
        H = _columns(decode(code, code_unit), 1)
        return (code, *(() if unit is None else (code_unit,)), matmul(H, H.mT))

    arrays = (stored, gram) if unit is None else (stored, unit, gram)
    carried = turn.on_refresh(rule, *arrays)
    return (carried[0], None, carried[1]) if unit is None else carried


def _to_float(g, dtype):
    return g.astype(dtype), None


def _from_float(stored, unit):
    del unit
    return stored.astype(jnp.promote_types(stored.dtype, jnp.float32))


def _to_codes(g, dtype):
    unit = jnp.max(jnp.abs(g), axis=-1, keepdims=True) / 127
    return jnp.round(g / jnp.where(unit > 0, unit, 1)).astype(dtype), unit  # a zero row has code 0


def _from_codes(stored, unit):
    return stored.astype(unit.dtype) * unit


def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int | Policy = 200,
    scale: jax.typing.ArrayLike = 0.25,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    fit: Fit | None = None,
    side: Literal["short", "long"] = "short",
    rotate_moments: bool = False,
    dense: optax.GradientTransformation | None = None,
    state_bits: StateBits = None,
    accumulate: int = 1,
    seed: int = 0,
    history: int = 4,
    damping: jax.typing.ArrayLike = 1e-3,
    relative_damping: bool = False,
    history_dtype: Any = None,
    preserve_norm: bool = False,
    precondition: Literal["gradient", "step"] = "gradient",
) -> optax.GradientTransformationExtraArgs:
    """Natural GaLore: GaLore whose coordinates pass through `scale_by_woodbury_fisher` before Adam.

    W ← W − η (α P N + λ_d W) with N = Adam((λI + H Hᵀ)⁻¹ PᵀG). State: that of `galore` and `history` · r · n numbers
    of `history_dtype` a matrix.

    Args:
      learning_rate: η, a number or a schedule.
      rank: r. Matrices with a side no longer than this are not projected.
      update_proj_gap: T, optimizer updates between refreshes, which may be traced; or a refresh policy, such as
        `every(200, stagger=True)`.
      scale: α, of the subspace step.
      b1, b2, eps, mu_dtype: of Adam.
      weight_decay: λ_d, decoupled, in full space.
      mask: which leaves decay, as in `optax.adamw`.
      weight_dimension_numbers: which axes make the matrix: overrides of `matrix_axes`.
      fit: how a basis is chosen; default `randomized_svd()`. The paper's is `svd()`.
      side: "short" or "long", the side of a matrix that is projected.
      rotate_moments: carry the moments over to the new basis at a refresh; the history always is.
      dense: a complete transformation, with its own learning rate, for the leaves that are not projected.
      state_bits: 8 keeps moments as 8-bit codes (`quantize_state`) and bases in bfloat16; a dict of arguments of
        `quantize_state`, such as {"min_size": 256}, does so in its own way.
      accumulate: k micro-batches that make one update. Their gradients are summed in the subspace (`accumulated`), and
        updates in between are zero; `update_proj_gap` and schedules count the real ones.
      seed: of the random sketches.
      history, damping, relative_damping, history_dtype, preserve_norm: of `scale_by_woodbury_fisher`.
      precondition: the "gradient", before Adam, as in the paper; or Adam's "step", whose history is then kept.

    Returns:
      A transformation.

    Raises:
      TypeError, ValueError: a bad `rank`, `side`, `history`, `damping`, `precondition` or `update_proj_gap`.

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
    adam = functools.partial(adam_moments, b1, b2, eps, mu_dtype, state_bits=state_bits)
    fisher = scale_by_woodbury_fisher(
        history,
        damping,
        relative_damping,
        history_dtype,
        preserve_norm=preserve_norm,
        batch_axes=1,
    )
    parts = [fisher, adam(rotate=rotate_moments)]
    if precondition == "step":
        parts.reverse()
    return assemble(
        low_rank(
            accumulated(optax.chain(*parts), accumulate, ("rotation",)),
            rank=rank,
            fit=fit or randomized_svd(),
            refresh=in_windows(as_policy(update_proj_gap), accumulate),
            axes=weight_dimension_numbers,
            side=side,
            scale=scale,
            seed=seed,
            basis_store=basis_store(state_bits),
        ),
        learning_rate,
        rank=rank,
        inner=adam(),
        dense=dense,
        axes=weight_dimension_numbers,
        weight_decay=weight_decay,
        mask=mask,
        accumulate=accumulate,
    )
