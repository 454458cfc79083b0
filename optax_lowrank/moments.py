"""Moments that follow the basis: rules whose `turn` carries them over at a refit.

When P is refit, coordinates change by R ↦ Q R with Q = P_newᵀ P_old. The papers but AdaRankGrad leave the moments in
the old coordinates, which means nothing in the new ones. Here the first moment is carried exactly, M ↦ Q M, and the
second by a rule that keeps it non-negative.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.rules import Rule, lifted

SecondMomentRule = Literal["ldadam", "square", "keep", "reset"]


class RotatedAdamState(NamedTuple):
    """State of `scale_by_rotated_adam`."""

    count: jax.Array  # () int32, updates so far
    mu: jax.Array  # (r, n), first moment M
    nu: jax.Array  # (r, n), second moment V
    mass: jax.Array  # (r, 1), share of its exponential average that each row of V has seen


def scale_by_rotated_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    second_moment: SecondMomentRule = "ldadam",
) -> Rule:
    """Adam whose moments are carried over to the new basis at a refit.

    At a refit, with m̂ = M / (1 − b1^t), v̂ = V / w and c² = rowsum(Q∘Q):

        M ← Q M,   w' = (Q∘Q) w,   V ← (w'/c²) |(Q∘Q)(v̂ − m̂²) + (Q m̂)²|,   w ← w'        ("ldadam")

    and M = V = w = 0 in rows with c² < 1e-6. On every step M and V are Adam's, w ← b2 w + (1 − b2), and

        N = (M / (1 − b1^t)) / (√(V / w) + eps).

    The mass w corrects each row of V for its own age: a direction that is new to the basis would otherwise take steps
    more than six times too large, since the count says that its correction is over. Where nothing rotates
    w = 1 − b2^t, and this is `optax.scale_by_adam`. Two-sided bases turn the columns by the same rules (the mass
    stays per row).

    Args:
      b1, b2, eps: as in `optax.scale_by_adam`.
      mu_dtype: dtype of the first moment; default that of the coordinates.
      second_moment: the rule at a refit: "ldadam" as above; "square", V ← (Q∘Q) V; "keep", V and w stay in the old
        coordinates; "reset", V = w = 0.

    Returns:
      A rule, for `low_rank` and `chained`; `optax.chain` takes transformations only.

    Raises:
      ValueError: `second_moment` is unknown.

    Example:
      >>> import optax_lowrank as ol
      >>> tx = ol.low_rank(ol.scale_by_rotated_adam(), rank=4)

    Reference: Refael et al. (AdaRankGrad), arXiv:2410.17881, rotates V linearly, which makes it negative; the rule for
      V is that of Robert et al. (LDAdam), arXiv:2410.16103, made exact for rows of different age by the mass.
    """
    if second_moment not in get_args(SecondMomentRule):
        raise ValueError(
            f"`second_moment` must be one of {get_args(SecondMomentRule)}, got {second_moment!r}."
        )

    def init(R):
        mass = jnp.zeros((*R.shape[:-1], 1), R.dtype)
        mu = jnp.zeros_like(R, dtype=mu_dtype)
        return RotatedAdamState(jnp.zeros([], jnp.int32), mu, jnp.zeros_like(R), mass)

    def turn(state, turn):
        V, w = state.nu, state.mass
        M = state.mu.astype(V.dtype)
        M_new, w_new = turn(M), turn.of_rows.squared(w)
        if second_moment == "keep":
            return state._replace(mu=M_new.astype(state.mu.dtype))
        coverage = turn.of_rows.squared(jnp.ones_like(w))
        known = coverage > 1e-6  # otherwise a row that is new to the basis: it starts anew
        if second_moment == "reset":
            known, V_new, w_new = jnp.ones_like(known), jnp.zeros_like(V), jnp.zeros_like(w)
        elif second_moment == "square":
            V_new = turn.squared(V)
        else:
            # at first M = 0
            age = jnp.where(state.count > 0, _correction(b1, state.count, V.dtype), 1)
            v = V / jnp.where(w > 0, w, 1)  # a row of no mass has V = 0
            v_new = jnp.abs(turn.squared(v - (M / age) ** 2) + (M_new / age) ** 2)
            V_new = w_new / jnp.where(known, coverage, 1) * v_new
        M, V, w = (jnp.where(known, x, 0) for x in (M_new, V_new, w_new))
        return state._replace(mu=M.astype(state.mu.dtype), nu=V, mass=w)

    def step(R, columns, state, **extra):
        del columns, extra
        decay1, decay2 = (jnp.asarray(b, R.dtype) for b in (b1, b2))
        count = optax.safe_increment(state.count)
        M = decay1 * state.mu.astype(R.dtype) + (1 - decay1) * R
        V = decay2 * state.nu + (1 - decay2) * R**2
        w = decay2 * state.mass + (1 - decay2)
        # V / w: after this step w > 0, unless b2 = 1
        N = M / _correction(b1, count, R.dtype) / (jnp.sqrt(V / w) + jnp.asarray(eps, R.dtype))
        return N, None, RotatedAdamState(count, M.astype(state.mu.dtype), V, w)

    return Rule(init, turn, step)


def _correction(decay, count, dtype):
    return 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)


def rotated(
    inner: optax.GradientTransformation,
    first: tuple[str, ...] = ("mu", "trace"),
    second: tuple[str, ...] = ("nu",),
) -> Rule:
    """Carries the moments of any transformation over to the new basis at a refit.

    M ← Q M in the state fields named in `first`, V ← (Q∘Q) V in those named in `second`. Lion, momentum, RMSProp and
    most of their kin need no more; for Adam prefer `scale_by_rotated_adam`, which knows the age of each row.

    Args:
      inner: transformation of (r, n) coordinates.
      first: names of the state fields that are linear in the gradient.
      second: names of the state fields that are averages of its square.

    Returns:
      A rule with the state of `inner`.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> tx = ol.low_rank(ol.rotated(optax.scale_by_lion()), rank=4)
    """

    def turn(state, turn):
        def leaf(key_path, x):
            fields = {getattr(part, "name", None) for part in key_path}
            if fields & set(first):
                return turn(x).astype(x.dtype)
            return turn.squared(x).astype(x.dtype) if fields & set(second) else x

        return jax.tree_util.tree_map_with_path(leaf, state)

    return lifted(inner)._replace(turn=turn)
