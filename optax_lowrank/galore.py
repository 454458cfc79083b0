"""GaLore: Adam on the gradient's coordinates in its own leading singular directions.

Zhao et al., arXiv:2403.03507, Algorithm 2:

    every T steps  P ← U[:, :r], G = U Σ Vᵀ
    R = PᵀG,   N = Adam(R),   W ← W − η · α P N
"""

import functools
from typing import Any, Literal

import jax
import optax

from optax_lowrank.accumulate import accumulated
from optax_lowrank.assemble import assemble
from optax_lowrank.bases import basis_store
from optax_lowrank.fits import Fit, randomized_svd
from optax_lowrank.low_rank import low_rank
from optax_lowrank.moments import rotated
from optax_lowrank.quantize import StateBits, adam_moments, in_bits
from optax_lowrank.refresh import Policy, as_policy, in_windows


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int | Policy = 200,
    scale: jax.typing.ArrayLike = 0.25,
    base_optimizer: optax.GradientTransformation | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    fit: Fit | None = None,
    side: Literal["short", "long"] = "short",
    rotate_moments: bool = False,
    dense: optax.GradientTransformation | None = None,
    state_bits: StateBits = None,
    accumulate: int = 1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore, a drop-in superset of `optax.contrib.galore`.

    R = PᵀG, N = Adam(R), W ← W − η (α P N + λ W). State: m·r + 2·n·r floats a matrix (m the projected side), 2 floats
    for every other parameter.

    Two defaults differ from `optax.contrib.galore`: `scale=0.25` as in the paper (there 1.0), and `side="short"` as in
    the authors' code (there the longer side is projected, which gives another, cheaper trajectory: `side="long"`).

    Args:
      learning_rate: η, a number or a schedule.
      rank: r. Matrices with a side no longer than this are not projected.
      update_proj_gap: T, optimizer updates between refreshes, which may be traced; or a refresh policy, such as
        `every(200, stagger=True)`.
      scale: α, multiplies the projected direction only.
      base_optimizer: gradient transformation in place of Adam, for projected and dense leaves.
      weight_decay: λ, decoupled, in full space.
      mask: which leaves decay, as in `optax.adamw`.
      weight_dimension_numbers: which axes make the matrix: overrides of `matrix_axes`; `GaLoreDimensionNumbers` are
        accepted, and axes named in neither of their fields are batch axes.
      b1, b2, eps, mu_dtype: of Adam.
      fit: how a basis is chosen; default `randomized_svd()`. The paper's is `svd()`.
      side: "short" or "long", the side of a matrix that is projected.
      rotate_moments: carry the moments over to the new basis at a refresh; the paper leaves them as they are.
      dense: a complete transformation, with its own learning rate, for the leaves that are not projected.
      state_bits: 8 keeps moments as 8-bit codes (`quantize_state`) and bases in bfloat16; a dict of arguments of
        `quantize_state`, such as {"min_size": 256}, does so in its own way.
      accumulate: k micro-batches that make one update. Their gradients are summed in the subspace (`accumulated`), and
        updates in between are zero; `update_proj_gap` and schedules count the real ones.
      seed: of the random sketches.

    Returns:
      A transformation.

    Raises:
      TypeError, ValueError: a bad `rank`, `side` or `update_proj_gap`; dimension numbers that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_lowrank as ol
      >>> target = jax.random.normal(jax.random.key(0), (16, 2)) @ jax.random.normal(jax.random.key(1), (2, 32))
      >>> loss = lambda params: jnp.mean((params["kernel"] - target) ** 2)
      >>> params = {"kernel": jnp.zeros((16, 32))}
      >>> tx = ol.galore(0.3, rank=4, scale=1.0)
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(100):
      ...     updates, state = update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 0.01 * loss({"kernel": jnp.zeros((16, 32))}))
      True

    Reference: Zhao et al., arXiv:2403.03507, Algorithm 2. Adam is Optax's (bias-corrected, eps outside the root); the
      authors' adds eps before the correction. Singular vectors get a sign rule.
    """
    if base_optimizer is None:
        adam = functools.partial(adam_moments, b1, b2, eps, mu_dtype, state_bits=state_bits)
        inner, rest = adam(rotate=rotate_moments), adam()
    else:
        rest = in_bits(base_optimizer, state_bits)
        inner = in_bits(rotated(base_optimizer), state_bits) if rotate_moments else rest
    return assemble(
        low_rank(
            accumulated(inner, accumulate, ("rotation",) if rotate_moments else ()),
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
        inner=rest,
        dense=dense,
        axes=weight_dimension_numbers,
        weight_decay=weight_decay,
        mask=mask,
        accumulate=accumulate,
    )
