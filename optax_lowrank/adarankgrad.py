"""AdaRankGrad: ranks that follow the gradient, moments that follow the basis.

Refael et al., arXiv:2410.17881. At a refresh, with the least r such that ‖G − P_r P_rᵀ G‖² ≤ η ‖G‖²:

    Q = P_newᵀ P_old,   M ← Q M,   V ← transport(Q, M, V)

and on every step R = PᵀG, N = Adam(R), W ← W − η · α P N.
"""

import functools
from typing import Any, Literal

import jax
import optax

from optax_lowrank.accumulate import accumulated
from optax_lowrank.assemble import assemble
from optax_lowrank.bases import basis_store
from optax_lowrank.fits import Fit, adaptive_rank, randomized_svd
from optax_lowrank.low_rank import low_rank
from optax_lowrank.quantize import StateBits, adam_moments
from optax_lowrank.refresh import Policy, as_policy, in_windows, on_convergence as converged


def adarankgrad(
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
    rotate_moments: bool = True,
    dense: optax.GradientTransformation | None = None,
    state_bits: StateBits = None,
    accumulate: int = 1,
    seed: int = 0,
    max_residual_energy: float = 0.3,
    min_rank: int = 8,
    rank_step: int = 8,
    on_convergence: float | Policy | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaRankGrad: each matrix keeps the rank that loses at most a given share of its gradient's energy.

    W ← W − η (α P N + λ W), N the step of `scale_by_rotated_adam`, P with as many columns as `adaptive_rank` says.
    Inside jit the rank is a mask; `compact` between steps releases the memory of unused columns. State at active rank
    r: m·r + 2·n·r + r floats a matrix.

    Args:
      learning_rate: η, a number or a schedule.
      rank: cap of the rank. Matrices with a side no longer than this are not projected.
      update_proj_gap: T, optimizer updates between refreshes, which may be traced; or a refresh policy, such as
        `every(200, stagger=True)`.
      scale: α, of the subspace step.
      b1, b2, eps, mu_dtype: of Adam.
      weight_decay: λ, decoupled, in full space.
      mask: which leaves decay, as in `optax.adamw`.
      weight_dimension_numbers: which axes make the matrix: overrides of `matrix_axes`.
      fit: what `adaptive_rank` wraps; default `randomized_svd()`.
      side: "short" or "long", the side of a matrix that is projected.
      rotate_moments: carry the moments over to the new basis at a refresh.
      dense: a complete transformation, with its own learning rate, for the leaves that are not projected.
      state_bits: 8 keeps moments as 8-bit codes (`quantize_state`) and bases in bfloat16; a dict of arguments of
        `quantize_state`, such as {"min_size": 256}, does so in its own way.
      accumulate: k micro-batches that make one update. Their gradients are summed in the subspace (`accumulated`), and
        updates in between are zero; `update_proj_gap` and schedules count the real ones.
      seed: of the random sketches.
      max_residual_energy: share of ‖G‖² that the basis may lose. (The authors' code bounds the root: its 0.2 is 0.04.)
      min_rank, rank_step: the ranks that are tried.
      on_convergence: also refresh a matrix when its projected gradient has shrunk: the threshold of
        `optax_lowrank.on_convergence`, or a refresh policy in place of the interval. Off by default.

    Returns:
      A transformation.

    Raises:
      TypeError, ValueError: a bad `rank`, `side`, `max_residual_energy`, `min_rank`, `rank_step`, `update_proj_gap`.

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
    if on_convergence is None:
        refresh = as_policy(update_proj_gap)
    elif callable(on_convergence):
        refresh = on_convergence
    else:
        refresh = converged(on_convergence, max_gap=update_proj_gap)
    adam = functools.partial(adam_moments, b1, b2, eps, mu_dtype, state_bits=state_bits)
    return assemble(
        low_rank(
            accumulated(
                adam(rotate=rotate_moments), accumulate, ("rotation",) if rotate_moments else ()
            ),
            rank=rank,
            fit=adaptive_rank(fit or randomized_svd(), max_residual_energy, min_rank, rank_step),
            refresh=in_windows(refresh, accumulate),
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
