"""APOLLO: the raw gradient, its columns scaled as Adam scales them in a random subspace.

Zhu et al., arXiv:2412.05270, Algorithm 1, column j of n:

    R = PᵀG,   N = Adam(R),   φ_j = ‖N_j‖ / ‖R_j‖   or, APOLLO-Mini,   φ = ‖N‖ / ‖R‖
    W ← W − η α G diag(φ)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.bases import seeded
from optax_lowrank.limit import LimitedState, around, limited, subspace_ratio
from optax_lowrank.options import Options, alias
from optax_lowrank.rules import Rule

Per = Literal["column", "matrix"]


def channel_scaling(
    moments: Rule,
    per: Per = "column",
    scale: jax.typing.ArrayLike = 1.0,
    limit: jax.typing.ArrayLike = 1.01,
) -> Rule:
    """APOLLO's rule around any moments: no step of the coordinates, c = α φ · limit, see `subspace_ratio`.

    Args:
      moments: rule that makes N of R.
      per: a ratio for each "column", or one for the "matrix".
      scale: α.
      limit: γ ≥ 1, how much the norm of the update may grow a step.
    """
    axis = 0 if per == "column" else None

    def step(R, columns, state, *, size, **extra):
        N, _, moments_state = moments.step(R, None, state.moments, size=size, **extra)
        columns = columns.astype(R.dtype)
        c = subspace_ratio(N, R, columns, size, axis)
        factor, norm = limited(jnp.sqrt(jnp.sum(jnp.square(c) * columns)), state.norm, limit)
        c = jnp.broadcast_to(jnp.asarray(scale, R.dtype) * factor * c, columns.shape)
        return None, c, LimitedState(moments_state, norm)

    return around(moments, step)


@alias()
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    per: Per = "column",
    limit: jax.typing.ArrayLike = 1.01,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: SGD-like memory with a learning rate for every column, as Adam in a random subspace would have it.

    W ← W − η (α G diag(φ) + λ W), φ_j = ‖N_j‖ / ‖R_j‖ with N = Adam(PᵀG), the norm of the update growing by at most a
    factor γ a step. State: 2·n·r floats a matrix and one more. Of the options, `fit` is `seeded()` by
    default, the paper's random projection, and `scale` multiplies the whole update.

    Args:
      learning_rate: η, a number or a schedule.
      per: "column" (APOLLO) or "matrix" (APOLLO-Mini, good at rank 1).
      limit: γ.
      **options: see `Options`.

    Returns:
      A transformation. Updates have the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: an option is wrong, or asks for two sides or accumulation; dimension numbers do not fit
        (`init`).

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
      >>> ol.memory_report(ol.apollo(0.01, rank=1, per="matrix"), shapes).arrays == 4 * 2 * 4096
      True

    Reference: Zhu et al., arXiv:2412.05270, Algorithm 1. Their projection has Gaussian entries of variance 1 / r, for
      which they correct φ by √(n / r); with orthonormal columns ‖R_j‖ is as much smaller, and nothing is to be
      corrected. The bound on φ where the basis hardly holds a column is ours.
    """
    if per not in get_args(Per):
        raise ValueError(f'`per` must be "column" or "matrix", got {per!r}.')
    options = Options(**options)
    options = dataclasses.replace(options, fit=options.fit or seeded())
    options.needs_whole_gradients("apollo", "its update")
    checks.number("limit", limit, 1)
    rule = channel_scaling(options.moments(), per, options.scale, limit)
    return options.optimizer(learning_rate, options.projected(rule))
