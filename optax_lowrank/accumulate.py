"""Gradient accumulation in the subspace: micro-batches are summed as (r, n) coordinates, not as gradients.

Projection is linear while the basis stands, so the mean of the coordinates is the coordinates of the mean. A window of
k micro-batches keeps one basis, refit from its first micro-batch where a refit is due.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_lowrank.linalg import matmul
from optax_lowrank.moments import turns

# What `low_rank` says of a refit: matrices that turn one axis, and whether they do. See the table in `low_rank.py`.
_TURNED = {"rotation": ("refreshed", -2), "column_rotation": ("column_refreshed", -1)}


class AccumulatedState(NamedTuple):
    """State of `accumulated`."""

    micro_step: jax.Array  # () int32, micro-batches of this window so far
    mean: Any  # tree like the updates, float32 or wider: their sum so far, divided by k
    rotation: dict[str, Any]  # what `keep` names: from the last window's coordinates to this one's
    inner: optax.OptState


def accumulated(
    inner: optax.GradientTransformation,
    k: int,
    keep: tuple[Literal["rotation", "column_rotation"], ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Gives `inner` the mean of k micro-batches; the updates of all but the last of them are zero.

    As `inner` of a `low_rank` it keeps r·n floats a matrix, where `optax.MultiSteps` around the whole keeps m·n. The
    basis must stand for a window, `low_rank(accumulated(inner, k), refresh=in_windows(policy, k))`, and there can be
    no residual, which needs the mean of whole gradients. The argument `accumulate` of the aliases does all of this.

    A micro-batch that is not finite counts as zero; if it is the last of a window, its matrix steps with the next one.

    Args:
      inner: any transformation.
      k: micro-batches of a window, ≥ 1; 1 makes it `inner` itself.
      keep: what rotating moments have to know of a refit at the beginning of the window: "rotation", r² floats a
        matrix, and for both sides of a nested `low_rank` "column_rotation".

    Returns:
      A transformation.

    Raises:
      ValueError: k < 1.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> tx = ol.accumulated(optax.sgd(1.0), k=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])):
      ...     update, state = tx.update(gradient, state)
      ...     print(update + 0.0)
      [0. 0.]
      [-2. -3.]
    """
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"`accumulate` must be a positive number of micro-batches, got {k!r}.")
    inner = optax.with_extra_args_support(inner)
    if k == 1:
        return inner

    def init(params):
        return AccumulatedState(*_start_of_window(params, keep), inner.init(params))

    def update(updates, state, params=None, **extra):
        mean, rotation = state.mean, state.rotation
        if "rotation" in extra:
            # a basis that is refit late, after bad gradients, turns what a stack has summed so far
            turn_of = turns(updates, extra)
            mean = {key: turn.on_refresh(_turned, mean[key])[0] for key, turn in turn_of.items()}
            rotation = {
                name: {key: _after(turn_of[key], extra[name][key], Q) for key, Q in of.items()}
                for name, of in rotation.items()
            }
        mean = jax.tree.map(lambda x, g: x + g.astype(x.dtype) / k, mean, updates)

        def last():
            told = dict(extra)
            for name, matrices in rotation.items():
                turned = jax.tree.map(_is_no_identity, matrices)
                told |= {name: matrices, _TURNED[name][0]: turned}
            narrow = jax.tree.map(lambda x, g: x.astype(g.dtype), mean, updates)
            out, new = inner.update(narrow, state.inner, params, **told)
            return out, AccumulatedState(*_start_of_window(updates, keep), new)

        def not_last():
            micro_step = state.micro_step + 1
            return optax.tree.zeros_like(updates), AccumulatedState(
                micro_step, mean, rotation, state.inner
            )

        return lax.cond(state.micro_step == k - 1, last, not_last)

    return optax.GradientTransformationExtraArgs(init, update)


def at_window_end(tx: optax.GradientTransformation, k: int) -> optax.GradientTransformation:
    """`tx` on every k-th call; in between updates, which are zero then, and its state stay as they are."""
    if k == 1:
        return tx
    return optax.conditionally_transform(
        tx, lambda step: (step + 1) % k == 0, forward_extra_args=True
    )


def _is_no_identity(Q):
    return jnp.any(jnp.broadcast_to(jnp.eye(Q.shape[-1], dtype=Q.dtype), Q.shape) != Q)


def _turned(turn, x):
    return (turn(x),)


def _after(turn, new, Q):
    """`new` after the rotation Q; no product on an ordinary step."""
    return turn.on_refresh(lambda _, Q: (matmul(new, Q),), Q)[0]


def _start_of_window(like, keep):
    """Fields of `AccumulatedState` before the first micro-batch."""
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    def identity(axis):
        return lambda x: jnp.broadcast_to(
            jnp.eye(x.shape[axis], dtype=x.dtype), (*x.shape[:-2], x.shape[axis], x.shape[axis])
        )

    unturned = {name: jax.tree.map(identity(_TURNED[name][1]), like) for name in keep}
    return jnp.zeros([], jnp.int32), jax.tree.map(wide, like), unturned
