"""AdaRankGrad: ranks that follow the gradient, moments that follow the basis.

Refael et al., arXiv:2410.17881. At a refit, with the least r such that ‖G − P_r P_rᵀ G‖² ≤ η ‖G‖²:

    Q = P_newᵀ P_old,   M ← Q M,   V ← transport(Q, M, V)

and on every step R = PᵀG, N = Adam(R), W ← W − η · α P N.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from optax_lowrank import checks
from optax_lowrank.fits import adaptive_rank, randomized_svd
from optax_lowrank.options import Options, alias
from optax_lowrank.refresh import Policy, on_convergence as converged


@alias(rotate_moments=True)
def adarankgrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    max_residual_energy: float = 0.3,
    min_rank: int = 8,
    rank_step: int = 8,
    on_convergence: float | Policy | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdaRankGrad: each matrix keeps the rank that loses at most a given share of its gradient's energy.

    W ← W − η (α P N + λ W), N the step of `scale_by_rotated_adam`, P with as many columns as `adaptive_rank` says.
    Inside jit the rank is a mask; `compact` between steps releases the memory of unused columns. State at active rank
    r: m·r + 2·n·r + r floats a matrix. Of the options, `rank` is the cap, and `fit` is what `adaptive_rank` wraps.

    Args:
      learning_rate: η, a number or a schedule.
      **options: see `Options`.
      max_residual_energy: share of ‖G‖² that the basis may lose. (The authors' code bounds the root: its 0.2 is 0.04.)
      min_rank, rank_step: the ranks that are tried.
      on_convergence: also refit a matrix when its projected gradient has shrunk: the threshold of
        `optax_lowrank.on_convergence`, or a refresh policy in place of the interval. Off by default.

    Returns:
      A transformation. Updates have the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: an option is wrong, or two of them contradict each other.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> G = jax.random.normal(jax.random.key(0), (64, 5)) @ jax.random.normal(jax.random.key(1), (5, 96))
      >>> tx = ol.adarankgrad(0.01, rank=32, max_residual_energy=0.01, min_rank=1, rank_step=1)
      >>> _, state = tx.update({"kernel": G}, tx.init({"kernel": G}))
      >>> ol.diagnostics(state)["kernel"].rank.tolist()
      [5]

    Reference: Refael et al., arXiv:2410.17881; where it is ambiguous see `adaptive_rank`, `scale_by_rotated_adam` and
      `on_convergence`. The residual is dropped, as in the paper.
    """
    options = Options(**options)
    policy = options.update_proj_gap
    if on_convergence is not None:
        if callable(policy):
            raise ValueError(
                "`on_convergence` needs a number for `update_proj_gap`, the longest gap, and got a policy: give one "
                "policy, in either argument."
            )
        if callable(on_convergence):
            policy = on_convergence
        else:
            min_gap = min(20, policy) if checks.is_integer(policy) else 20
            policy = converged(on_convergence, min_gap, max_gap=policy)
    if hasattr(options.fit, "implicit"):
        raise ValueError(
            "`fit` must choose its columns by the gradient in `adarankgrad`: a seeded or DCT basis has a fixed rank."
        )
    fit = adaptive_rank(options.fit or randomized_svd(), max_residual_energy, min_rank, rank_step)
    options = dataclasses.replace(options, fit=fit, update_proj_gap=policy)
    matrix = options.projected(options.moments(), scale=options.scale)
    return options.optimizer(learning_rate, matrix)
