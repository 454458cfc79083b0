"""Fira: full-rank training in low-rank memory, by a scaled residual next to the subspace step.

Chen et al., arXiv:2410.01623, equations 4 to 8, column j of n:

    S = G − P R,   φ_j = ‖N_j‖ / ‖R_j‖,   S ← S · diag(φ),   S ← S · min(1, γ ‖S_prev‖ / ‖S‖)
    W ← W − η (α P N + β S)

With c = β φ · min(1, …) that is P (α N − R diag(c)) + G diag(c), and since S is orthogonal to P, ‖(G − P R)_j‖² =
‖G_j‖² − ‖R_j‖²: the residual itself is nowhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.limit import LimitedState, around, limited, subspace_ratio
from optax_lowrank.options import Options, alias
from optax_lowrank.rules import Rule


def with_residual(
    moments: Rule,
    scale: jax.typing.ArrayLike = 0.25,
    limit: jax.typing.ArrayLike = 1.01,
    residual_scale: jax.typing.ArrayLike = 1.0,
) -> Rule:
    """Fira's rule around any moments: A = α N − R diag(c), c = β φ · limit.

    φ_j is what the moments did to the coordinates of a column, see `subspace_ratio`.

    Args:
      moments: rule that makes N of R.
      scale: α.
      limit: γ ≥ 1.
      residual_scale: β.
    """

    def step(R, columns, state, *, size, **extra):
        N, _, moments_state = moments.step(R, None, state.moments, size=size, **extra)
        columns = columns.astype(R.dtype)
        left = jnp.sqrt(jnp.maximum(columns - jnp.sum(jnp.square(R), axis=0), 0))
        c = subspace_ratio(N, R, columns, size)
        factor, norm = limited(jnp.sqrt(jnp.sum(jnp.square(c * left))), state.norm, limit)
        c = jnp.asarray(residual_scale, R.dtype) * factor * c
        return jnp.asarray(scale, R.dtype) * N - R * c[None], c, LimitedState(moments_state, norm)

    return around(moments, step)


@alias()
def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    limit: jax.typing.ArrayLike = 1.01,
    residual_scale: jax.typing.ArrayLike = 1.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the part of the gradient outside the subspace, scaled column by column.

    W ← W − η (α P N + β S + λ W), with N = Adam(PᵀG) and S the residual (G − P PᵀG) · diag(‖N_j‖ / ‖R_j‖), its norm
    growing by at most a factor γ a step. State: that of `galore` and one float a matrix.

    Args:
      learning_rate: η, a number or a schedule.
      **options: see `Options`.
      limit: γ. The paper's ablation has 1.01 best, infinity worst.
      residual_scale: β. 1 is how the published tables were made; the paper's text has β = α.

    Returns:
      A transformation. Updates have the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: an option is wrong, or asks for two sides or accumulation; dimension numbers do not fit
        (`init`).

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> tx = ol.fira(0.01, rank=8)
      >>> params = {"kernel": jnp.ones((64, 96)), "bias": jnp.zeros(96)}
      >>> print(str(ol.memory_report(tx, params)).splitlines()[2])
      kernel                   projected      1      24,576            8,192   49,152   16.7 %

    Reference: Chen et al., arXiv:2410.01623, Algorithm 1. The authors' code multiplies P R by α inside the residual,
      which lets a share of the subspace back in, and limits before bias correction; ours follows the text in both.
      The bound on φ_j where the basis hardly holds a column is ours.
    """
    options = Options(**options)
    options.needs_whole_gradients("fira", "its residual")
    checks.number("limit", limit, 1)
    checks.number("residual_scale", residual_scale, 0)
    rule = with_residual(options.moments(), options.scale, limit, residual_scale)
    return options.optimizer(learning_rate, options.projected(rule))
