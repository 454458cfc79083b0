"""Fira: full-rank training in low-rank memory, by a scaled residual next to the subspace step.

Chen et al., arXiv:2410.01623, equations 4 to 8, column j of n:

    S = G − P R,   φ_j = ‖N_j‖ / ‖R_j‖,   S ← S · diag(φ),   S ← S · min(1, γ ‖S_prev‖ / ‖S‖)
    W ← W − η (α P N + S)
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.assemble import assemble
from optax_lowrank.bases import basis_store
from optax_lowrank.fits import Fit, randomized_svd
from optax_lowrank.low_rank import low_rank
from optax_lowrank.quantize import StateBits, adam_moments
from optax_lowrank.refresh import Policy, as_policy


def scale_by_subspace_ratio(
    per: Literal["column", "matrix"] = "column", eps: jax.typing.ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Scales the residual as `inner` scaled the coordinates: E_j ← E_j · ‖N_j‖ / (‖R_j‖ + eps).

    For the `residual` slot of `low_rank`, whose `coords` R and `steps` N it reads; any `inner` will do.

    Args:
      per: one ratio a column, or one a matrix ("Fira-matrix" in the paper's ablation, slightly worse there).
      eps: keeps a column without gradient (‖R_j‖ = 0, then E_j is scaled by ‖N_j‖ / eps) finite.

    Returns:
      A stateless transformation of (b, m, n) residuals.

    Raises:
      ValueError: `per` is neither "column" nor "matrix".

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.scale_by_subspace_ratio()
      >>> R, N, E = ({"w/R": x * jnp.ones((1, 2, 3))} for x in (2.0, 1.0, 5.0))
      >>> tx.update(E, tx.init(E), coords=R, steps=N)[0]["w/R"][0, 0].tolist()
      [2.5, 2.5, 2.5]

    Reference: arXiv:2410.01623, equation 6.
    """
    if per not in ("column", "matrix"):
        raise ValueError(f'`per` must be "column" or "matrix", got {per!r}.')
    axis = -2 if per == "column" else (-2, -1)
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))

    def update(updates, state, params=None, *, coords, steps, **extra):
        del params, extra
        ratio = jax.tree.map(lambda R, N: length(N) / (length(R) + eps), coords, steps)
        return jax.tree.map(jnp.multiply, updates, ratio), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class NormGrowthState(NamedTuple):
    """State of `limit_norm_growth`."""

    norm: Any  # (b,) float32 a leaf: ‖S‖ after limiting, on the last step; 0 where there was none


def limit_norm_growth(
    limit: jax.typing.ArrayLike = 1.01, batch_axes: int = 0
) -> optax.GradientTransformation:
    """Lets the norm of an update grow by at most a factor `limit` a step: S ← S · min(1, limit · ‖S_prev‖ / ‖S‖).

    ‖S_prev‖ is the norm after limiting. The first step is free, and so is one after a zero update: a stored 0 means
    "no previous", or the residual would take some 1400 steps to come back. An update that is not finite passes and
    leaves the stored norm alone.

    Args:
      limit: γ ≥ 1.
      batch_axes: how many leading axes are batch axes, each entry with a norm of its own.

    Returns:
      A transformation of any tree of arrays.

    Raises:
      ValueError: limit < 1.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.limit_norm_growth(1.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for size in (1.0, 10.0, 0.5):
      ...     update, state = tx.update(jnp.array([size, 0.0]), state)
      ...     print(float(update[0]))
      1.0
      1.5
      0.5

    Reference: arXiv:2410.01623, equation 8. The authors' code keeps a norm of 0 or NaN as "previous" for good.
    """
    if isinstance(limit, (int, float)) and limit < 1:
        raise ValueError(
            f"`limit` must be at least 1, got {limit}: a smaller one stops the update for good."
        )

    def init(params):
        return NormGrowthState(
            jax.tree.map(lambda p: jnp.zeros(p.shape[:batch_axes], jnp.float32), params)
        )

    def update(updates, state, params=None):
        del params

        def leaf(S, previous):
            norm = jnp.sqrt(jnp.sum(jnp.square(S), axis=tuple(range(batch_axes, S.ndim))))
            grows = (previous > 0) & (norm > limit * previous) & jnp.isfinite(norm)
            factor = jnp.where(grows, limit * previous / jnp.where(grows, norm, 1), 1)
            kept = jnp.where(jnp.isfinite(norm), norm * factor, previous).astype(jnp.float32)
            return S * jnp.expand_dims(factor, range(batch_axes, S.ndim)), kept

        leaves = jax.tree.map(leaf, updates, state.norm)
        limited, norm = (
            jax.tree.map(lambda _, pair, i=i: pair[i], updates, leaves) for i in range(2)
        )
        return limited, NormGrowthState(norm)

    return optax.GradientTransformation(init, update)


def fira(
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
    limit: jax.typing.ArrayLike = 1.01,
    residual_scale: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the part of the gradient outside the subspace, scaled column by column.

    W ← W − η (α P N + β S + λ W), with N = Adam(PᵀG) and S the residual (G − P PᵀG) · diag(‖N_j‖ / ‖R_j‖), its norm
    growing by at most a factor γ a step. State: that of `galore` and one float a matrix.

    Args:
      learning_rate: η, a number or a schedule.
      rank: r. Matrices with a side no longer than this are not projected.
      update_proj_gap: T, optimizer updates between refreshes, which may be traced; or a refresh policy, such as
        `every(200, stagger=True)`.
      scale: α, of the subspace step.
      b1, b2, eps, mu_dtype: of Adam.
      weight_decay: λ, decoupled, in full space.
      mask: which leaves decay, as in `optax.adamw`.
      weight_dimension_numbers: which axes make the matrix: overrides of `matrix_axes`.
      fit: how a basis is chosen; default `randomized_svd()`. The paper's is `svd()`.
      side: "short" or "long", the side of a matrix that is projected.
      rotate_moments: carry the moments over to the new basis at a refresh; the paper leaves them as they are.
      dense: a complete transformation, with its own learning rate, for the leaves that are not projected.
      state_bits: 8 keeps moments as 8-bit codes (`quantize_state`) and bases in bfloat16; a dict of arguments of
        `quantize_state`, such as {"min_size": 256}, does so in its own way.
      accumulate: 1; the residual needs the mean of whole gradients, which `optax.MultiSteps` keeps.
      seed: of the random sketches.
      limit: γ. The paper's ablation has 1.01 best, infinity worst.
      residual_scale: β. 1 is how the published tables were made; the paper's text has β = α.

    Returns:
      A transformation.

    Raises:
      TypeError, ValueError: a bad `rank`, `side`, `limit` or `update_proj_gap`; dimension numbers that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.fira(0.01, rank=8)
      >>> params = {"kernel": jnp.ones((64, 96)), "bias": jnp.zeros(96)}
      >>> print(str(ol.memory_report(tx, params)).splitlines()[2])
      kernel                   projected      1      24,576            8,192   49,152   16.7 %

    Reference: Chen et al., arXiv:2410.01623, Algorithm 1. The authors' code multiplies P R by α inside the residual,
      which lets a share of the subspace back in, and limits before bias correction; ours follows the text in both.
    """
    if accumulate != 1:
        raise ValueError(
            f"`accumulate` must be 1, got {accumulate!r}: Fira's residual needs whole gradients. Wrap the optimizer in "
            "`optax.MultiSteps`, or use `galore`."
        )
    adam = functools.partial(adam_moments, b1, b2, eps, mu_dtype, state_bits=state_bits)
    return assemble(
        low_rank(
            adam(rotate=rotate_moments),
            rank=rank,
            fit=fit or randomized_svd(),
            refresh=as_policy(update_proj_gap),
            residual=optax.chain(
                scale_by_subspace_ratio(),
                limit_norm_growth(limit, batch_axes=1),
                optax.scale(residual_scale),
            ),
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
    )
