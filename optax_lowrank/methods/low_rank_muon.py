"""Low-rank Muon: the momentum of a subspace, and the orthogonalised sum of it and the gradient.

    M = β P C + (1 − β) G,   C ← β C + (1 − β) PᵀG,   at a refit C ← P'ᵀ P C
    W ← W − η O(M),   with Nesterov O(β M + (1 − β) G) (both bias-corrected),   O the polar factor by Newton–Schulz

Muon: Jordan et al., 2024; Bernstein and Newhouse, arXiv:2409.20325. What of the gradient is outside of the basis goes
into the orthogonalisation at full weight, what of the old momentum is outside of a new basis is dropped.

The default basis is random and not stored. O makes strong directions and weak ones alike; a single gradient shows the
strong ones, and it is the weak ones that need the mean over steps. The leading directions of the momentum, which
`subspace_iteration()` follows, are those that need it least: at equal bytes their loss is higher.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.bases import seeded
from optax_lowrank.classify import views_by_path
from optax_lowrank.linalg import newton_schulz
from optax_lowrank.low_rank import Geometry
from optax_lowrank.options import Options, alias
from optax_lowrank.rules import Rule
from optax_lowrank.walls import after, automatic


class MomentumState(NamedTuple):
    """State of low-rank momentum."""

    count: jax.Array  # () int32, updates so far
    mu: jax.Array  # (r, n), C: the momentum is P C


def low_rank_momentum(beta: jax.typing.ArrayLike = 0.95, nesterov: bool = True) -> Rule:
    """Momentum M = β P C + (1 − β) G, of which the state keeps what is in the basis, C ← β C + (1 − β) R.

    A basis that is fitted is fitted to M itself (`recall`), as LDAdam's is.

    Args:
      beta: β.
      nesterov: β M + (1 − β) G in place of M; both as Optax's Muon corrects their bias.

    Reference: Robert et al. (LDAdam), arXiv:2410.16103; Ahn et al. (Dion), arXiv:2504.05295, which keeps the momentum
      whole.
    """

    def step(R, columns, state, **extra):
        del extra
        b = jnp.asarray(beta, R.dtype)
        count = optax.safe_increment(state.count)
        correction = lambda t: 1 - b ** t.astype(R.dtype)
        old, new = b, 1 - b  # M = old · P C + new · G
        if nesterov:
            later = b / correction(optax.safe_increment(count))
            old, new = later * b, (1 - b) * (later + 1 / correction(count))
        else:
            old, new = old / correction(count), new / correction(count)
        C = state.mu.astype(R.dtype)
        mu = (b * C + (1 - b) * R).astype(state.mu.dtype)
        c = new * jnp.ones(columns.shape, R.dtype)
        return old * C, c, MomentumState(count, mu)

    def recall(state):
        # the fit sees P · recall + G, which spans what β P C + (1 − β) G does
        b = jnp.asarray(beta, state.mu.dtype)
        return state.mu * (b / (1 - b))

    return Rule(
        init=lambda R: MomentumState(jnp.zeros([], jnp.int32), jnp.zeros_like(R)),
        turn=lambda state, turn: state._replace(mu=turn(state.mu).astype(state.mu.dtype)),
        step=step,
        recall=recall,
    )


def _scale(shape, consistent_rms):
    """Muon's factor for a matrix of (inputs, outputs): √max(1, outputs / inputs), or RMS · √max."""
    fan_in, fan_out = shape
    if consistent_rms is not None:
        return max(fan_in, fan_out) ** 0.5 * consistent_rms
    return max(1, fan_out / fan_in) ** 0.5


def orthogonalized(ns_steps: int = 5, consistent_rms: float | None = None) -> Geometry:
    """The geometry of Muon: a step in full space becomes its polar factor, scaled by the shape of the matrix."""

    def retract(U, W, kept, state, *, axis, **extra):
        del W, kept, extra
        size = _scale((U.shape[axis], U.shape[1 - axis]), consistent_rms)
        return newton_schulz(U, ns_steps) * jnp.asarray(size, U.dtype), state

    return Geometry(lambda W, axis: (), None, retract, reads_weights=False)


def orthogonalize(
    ns_steps: int = 5, consistent_rms: float | None = None, axes: Any = None
) -> optax.GradientTransformation:
    """Replaces every matrix by its polar factor U Vᵀ, approximately, with Muon's scale for its shape.

    X ← X / ‖X‖, then `ns_steps` times X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, on the shorter side, which drives all
    singular values into about [0.7, 1.2]; then times √max(1, outputs / inputs), or with `consistent_rms` κ
    √max(outputs, inputs).

    Args:
      ns_steps: Newton–Schulz iterations.
      consistent_rms: κ; 0.2 has the entries of Adam's steps.
      axes: overrides of `matrix_axes`; stacks of matrices are taken apart, and leaves that are no matrices pass as
        they are.

    Returns:
      A stateless transformation; put momentum before it, the learning rate behind.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> tx = optax.chain(optax.trace(0.95), ol.orthogonalize(), optax.scale_by_learning_rate(0.02))
      >>> params = {"kernel": jnp.diag(jnp.array([3.0, 1.0])), "bias": jnp.ones(2)}
      >>> update, _ = ol.orthogonalize().update(params, optax.EmptyState())
      >>> jnp.allclose(update["kernel"], jnp.eye(2), atol=0.35).item(), update["bias"].tolist()
      (True, [1.0, 1.0])

    Reference: Jordan et al., Muon, 2024; Liu et al., arXiv:2502.16982, for the consistent root mean square.
    """

    def update(updates, state, params=None):
        del params
        leaves, treedef, views = views_by_path(updates, axes, "reduction")
        before = None
        for path, view in views.items():
            if view:
                size = _scale((view.m, view.n), consistent_rms)
                one = lambda X, size=size: newton_schulz(X, ns_steps) * jnp.asarray(size, X.dtype)
                G = view.fold(leaves[path])
                leaves[path] = view.unfold(after(before, jax.vmap(one), G))
                before = leaves[path], ()
        return treedef.unflatten(leaves.values()), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), automatic(update))


@alias(without=("scale",), update_proj_gap=20, side="long")
def low_rank_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: float | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon whose momentum lives in a random subspace of the longer side: r floats for each row of the shorter one.

    M = β P C + (1 − β) G, W ← W − η (s O(M) + λ W); O is Newton–Schulz, s Muon's scale for the shape. With a basis
    of the whole side it is `optax.contrib.muon`'s step.

    Of the options, `fit` is `seeded()`, `update_proj_gap` is 20, the steps that the momentum reaches back (in runs of
    1,200 steps 60 had a smaller loss than 20 and 200, in runs of 300 a larger one), `side` is "long", and b1, b2, eps
    are of the dense leaves; the momentum always turns with its basis, whatever `rotate_moments`. With
    `fit=subspace_iteration()` and `update_proj_gap=1` the basis follows the momentum, and both are stored.

    Args:
      learning_rate: η, a number or a schedule; 0.02 is Muon's usual, in 4 bits 0.04 was better.
      **options: see `Options`.
      beta: β of the momentum.
      nesterov: look one step ahead.
      ns_steps: Newton–Schulz iterations.
      consistent_rms: κ scales updates by κ √max(inputs, outputs) instead of √max(1, outputs / inputs).

    Returns:
      A transformation. Updates have the gradients' shapes and dtypes.

    Raises:
      TypeError, ValueError: an option is wrong, or asks for two sides or accumulation; dimension numbers do not fit
        (`init`).

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
      >>> ol.memory_report(ol.low_rank_muon(0.02, rank=32), shapes).arrays == 4 * 32 * 1024
      True

    Reference: Jordan et al., Muon, 2024; the low-rank momentum is ours, see `low_rank_momentum`.
    """
    options = Options(**options)
    options = dataclasses.replace(options, fit=options.fit or seeded())
    options.needs_whole_gradients("low_rank_muon", "the orthogonalisation")
    checks.number("beta", beta, 0, below=1)
    checks.integer("ns_steps", ns_steps, 1)
    if consistent_rms is not None:
        checks.number("consistent_rms", consistent_rms, 0)
    rule = options.coded(low_rank_momentum(beta, nesterov))
    matrix = options.projected(rule, geometry=orthogonalized(ns_steps, consistent_rms))
    return options.optimizer(learning_rate, matrix)
