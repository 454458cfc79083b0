"""How far a column of the whole gradient goes, from what moments did in a subspace; and how fast an update may grow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.rules import Rule, unturned, wide


def subspace_ratio(
    N: jax.Array, R: jax.Array, columns: jax.Array, m: int, axis: int | None = 0
) -> jax.Array:
    """φ_j = ‖N_j‖ / ‖R_j‖: what the moments made of the coordinates of a column, to scale the rest of the column alike.

    Where the basis hardly holds a column this is a ratio of noise. A random basis holds r / m of it; a column of
    which ours holds less than a quarter of that is taken to have a quarter: ‖G_j‖ φ_j ≤ 2 √(m / r) ‖N_j‖, twice as
    far as moments of all of G could have gone.

    Args:
      N, R: (r, n), step and coordinates.
      columns: (n,), ‖G_j‖².
      m: rows of G.
      axis: 0, a ratio for each column; None, one for the matrix.

    Returns:
      (n,) ratios, or ().
    """
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=axis))
    whole = jnp.sqrt(columns if axis == 0 else jnp.sum(columns))
    # columns that the basis does not use have no share in it; of a gradient that has left the basis R is zero, and the
    # moments' step is not
    r = jnp.sum(jnp.any((R != 0) | (N != 0), axis=1)).astype(R.dtype)
    return length(N) / (jnp.maximum(length(R), jnp.sqrt(r / (4 * m)) * whole) + 1e-8)


def limited(
    norm: jax.Array, previous: jax.Array, limit: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The factor min(1, γ ‖S_prev‖ / ‖S‖), and the norm after it; a stored 0 means "no previous"."""
    allowed = jnp.asarray(limit, norm.dtype) * previous.astype(norm.dtype)
    grows = (previous > 0) & (norm > allowed) & jnp.isfinite(norm)
    factor = jnp.where(grows, allowed / jnp.where(grows, norm, 1), 1)
    return factor, jnp.where(jnp.isfinite(norm), norm * factor, previous).astype(previous.dtype)


class LimitedState(NamedTuple):
    """State of a rule whose update is limited."""

    moments: Any  # of Adam
    norm: jax.Array  # () float32, ‖S‖ after limiting, on the last step; 0 where there was none


def around(moments: Rule, step) -> Rule:
    """A rule that asks the moments for a step of the coordinates and limits what it makes of it; see `LimitedState`."""

    def turn(state, turn):
        return state._replace(moments=moments.turn(state.moments, turn))

    return Rule(
        init=lambda R: LimitedState(moments.init(R), jnp.zeros([], jnp.float32)),
        turn=unturned if moments.turn is unturned else turn,
        step=step,
    )


class NormGrowthState(NamedTuple):
    """State of `limit_norm_growth`."""

    norm: Any  # (b,) float32 a leaf: ‖S‖ after limiting, on the last step; 0 where there was none


def limit_norm_growth(
    limit: jax.typing.ArrayLike = 1.01, batch_axes: int = 0
) -> optax.GradientTransformation:
    """Lets the norm of an update grow by at most a factor `limit` a step: S ← S · min(1, limit · ‖S_prev‖ / ‖S‖).

    ‖S_prev‖ is the norm after limiting. The first step is free, and so is one after a zero update: a stored 0 means
    "no previous", or the update would take some 1400 steps to come back. An update that is not finite passes and
    leaves the stored norm alone.

    Args:
      limit: γ ≥ 1; a smaller one would stop the update for good.
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

    Reference: Chen et al. (Fira), arXiv:2410.01623, equation 8. The authors' code keeps a norm of 0 or NaN as
      "previous" for good.
    """
    checks.number("limit", limit, 1)

    def init(params):
        start = lambda p: jnp.zeros(p.shape[:batch_axes], jnp.float32)
        return NormGrowthState(jax.tree.map(start, params))

    def update(updates, state, params=None):
        del params

        def leaf(S, previous):
            factor, kept = limited(_norm(S, batch_axes), previous, limit)
            return S * jnp.expand_dims(factor, range(batch_axes, S.ndim)).astype(S.dtype), kept

        leaves = jax.tree.map(leaf, updates, state.norm)
        new, norm = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, leaves) for i in range(2))
        return new, NormGrowthState(norm)

    return optax.GradientTransformation(init, update)


def _norm(S, batch_axes):
    """‖S‖ in float32 or wider, by its largest entry, so that no square of a finite one overflows."""
    axes = tuple(range(batch_axes, S.ndim))
    S = S.astype(wide(S))
    largest = jnp.max(jnp.abs(S), axis=axes, keepdims=True, initial=0)
    unit = S / jnp.where(largest > 0, largest, 1)
    return jnp.sqrt(jnp.sum(jnp.square(unit), axis=axes)) * jnp.squeeze(largest, axes)
