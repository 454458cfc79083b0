"""GaLore: Adam on the gradient's coordinates in its own leading singular directions.

Zhao et al., arXiv:2403.03507, Algorithm 2:

    every T steps  P ← U[:, :r], G = U Σ Vᵀ
    R = PᵀG,   N = Adam(R),   W ← W − η · α P N
"""

from __future__ import annotations

from typing import Any

import optax

from optax_lowrank.options import Options, alias


@alias(
    positional=(  # as in `optax.contrib.galore`
        "rank",
        "update_proj_gap",
        "scale",
        "base_optimizer",
        "weight_decay",
        "mask",
        "weight_dimension_numbers",
    )
)
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    base_optimizer: optax.GradientTransformation | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """GaLore, a drop-in superset of `optax.contrib.galore`.

    R = PᵀG, N = Adam(R), W ← W − η (α P N + λ W). State: m·r + 2·n·r floats a matrix (m the projected side), 2 floats
    for every other parameter.

    Two defaults differ from `optax.contrib.galore`: `scale=0.25` as in the paper (there 1.0), and `side="short"` as in
    the authors' code (there the longer side is projected, which gives another, cheaper trajectory: `side="long"`).

    Args:
      learning_rate: η, a number or a schedule.
      base_optimizer: a direction in place of Adam's, for projected and dense leaves: `optax.scale_by_lion()`, say,
        without a learning rate.
      **options: see `Options`.

    Returns:
      A transformation. Updates have the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: an option is wrong; dimension numbers do not fit (`init`).

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
    options = Options(**options)
    matrix = options.projected(options.moments(base_optimizer), scale=options.scale)
    return options.optimizer(learning_rate, matrix, inner=base_optimizer)
