"""Moments that follow the basis: what `rotation` and `refreshed` of `low_rank` are for.

When P is refit, coordinates change by R ↦ Q R with Q = P_newᵀ P_old. The papers but AdaRankGrad leave the moments in
the old coordinates, which means nothing in the new ones. Here the first moment is carried exactly, M ↦ Q M, and the
second by a rule that keeps it non-negative.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_lowrank.linalg import matmul
from optax_lowrank.views import owner

SecondMomentRule = Literal["ldadam", "square", "keep", "reset"]


class RotatedAdamState(NamedTuple):
    """State of `scale_by_rotated_adam`: trees like the coordinates."""

    count: jax.Array  # () int32, updates so far
    mu: Any  # (b, r, n), first moment M
    nu: Any  # (b, r, n), second moment V
    mass: Any  # (b, r, 1), share of its exponential average that each row of V has seen


def scale_by_rotated_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    second_moment: SecondMomentRule = "ldadam",
) -> optax.GradientTransformationExtraArgs:
    """Adam whose moments are carried over to the new basis at a refresh.

    At a refresh, with m̂ = M / (1 − b1^t), v̂ = V / w and c² = rowsum(Q∘Q):

        M ← Q M,   w' = (Q∘Q) w,   V ← (w'/c²) |(Q∘Q)(v̂ − m̂²) + (Q m̂)²|,   w ← w'        ("ldadam")

    and M = V = w = 0 in rows with c² < 1e-6. On every step M and V are Adam's, w ← b2 w + (1 − b2), and

        N = (M / (1 − b1^t)) / (√(V / w) + eps).

    The mass w corrects each row of V for its own age: a direction that is new to the basis would otherwise take steps
    more than six times too large, since the global count says that its correction is over. Where nothing rotates
    w = 1 − b2^t, and this is `optax.scale_by_adam`.

    Args:
      b1, b2, eps: as in `optax.scale_by_adam`.
      mu_dtype: dtype of the first moment; default that of the coordinates.
      second_moment: the rule at a refresh: "ldadam" as above; "square", V ← (Q∘Q) V; "keep", V and w stay in the old
        coordinates; "reset", V = w = 0.

    Returns:
      A transformation of (b, r, n) coordinates; takes `rotation`, `refreshed`, and inside a nested `low_rank`
      `column_rotation`, `column_refreshed`, which turn the columns by the same rules (the mass stays per row).

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

    def init(params):
        return RotatedAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
            mass=jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1), p.dtype), params),
        )

    def update(updates, state, params=None, **extra):
        del params
        seen = state.count.astype(jnp.float32)

        def carry(turn, M, V, w):
            M_new, w_new = turn(M), turn.squared(w)
            if second_moment == "keep":
                return M_new, V, w
            if second_moment == "reset":
                return M_new, jnp.zeros_like(V), jnp.zeros_like(w)
            coverage = turn.squared(jnp.ones_like(w))
            known = coverage > 1e-6  # otherwise a row that is new to the basis: it starts anew
            if second_moment == "square":
                V_new = turn.squared(V)
            else:
                m = M / jnp.where(seen > 0, 1 - b1**seen, 1)  # before the first update M = 0
                v = V / jnp.where(w > 0, w, 1)  # a row of no mass has V = 0
                v_new = jnp.abs(turn.squared(v - m**2) + turn(m) ** 2)
                V_new = w_new / jnp.where(known, coverage, 1) * v_new
            return tuple(jnp.where(known, x, 0) for x in (M_new, V_new, w_new))

        def leaf(g, M, V, w, turn):
            M = M.astype(V.dtype)
            if turn is not None:
                M, V, w = turn.on_refresh(carry, M, V, w)
            M = b1 * M + (1 - b1) * g
            V = b2 * V + (1 - b2) * g**2
            w = b2 * w + (1 - b2)
            # V / w: after this step w > 0, unless b2 = 1
            return M / (1 - b1 ** (seen + 1)) / (jnp.sqrt(V / w) + eps), M, V, w

        columns = jax.tree.map(leaf, updates, state.mu, state.nu, state.mass, turns(updates, extra))
        N, M, V, w = (
            jax.tree.map(lambda _, column, i=i: column[i], updates, columns) for i in range(4)
        )
        return N, RotatedAdamState(
            optax.safe_increment(state.count), optax.tree.cast(M, mu_dtype), V, w
        )

    return optax.GradientTransformationExtraArgs(init, update)


def rotated(
    inner: optax.GradientTransformation,
    first: tuple[str, ...] = ("mu", "trace"),
    second: tuple[str, ...] = ("nu",),
) -> optax.GradientTransformationExtraArgs:
    """Carries the moments of any transformation over to the new basis at a refresh.

    Before `inner` updates, M ← Q M in the state fields named in `first`, V ← (Q∘Q) V in those named in `second`. Lion,
    momentum, RMSProp and most of their kin need no more; for Adam prefer `scale_by_rotated_adam`, which knows the age
    of each row.

    Args:
      inner: transformation of (b, r, n) coordinates.
      first: names of the state fields that are linear in the gradient.
      second: names of the state fields that are averages of its square.

    Returns:
      A transformation with the state of `inner`.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> tx = ol.low_rank(ol.rotated(optax.scale_by_lion()), rank=4)
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        if "rotation" in extra:
            turn_of = turns(updates, extra)

            def carry(key_path, x):
                key, fields = (
                    owner(key_path, turn_of),
                    {getattr(part, "name", None) for part in key_path},
                )
                if key is None or not fields & {*first, *second}:
                    return x
                rule = Turn.__call__ if fields & set(first) else Turn.squared
                return turn_of[key].on_refresh(lambda turn, x: (rule(turn, x),), x)[0]

            state = jax.tree_util.tree_map_with_path(carry, state)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


class Turn(NamedTuple):
    """Change of coordinates of one leaf: x ↦ Q x, and inside a nested `low_rank` also x ↦ x Kᵀ."""

    Q: jax.Array  # (b, r, r)
    K: jax.Array | None  # (b, n, n), acts on columns
    refreshed: jax.Array  # () bool

    def __call__(self, x):
        """What is linear in the gradient, in the new coordinates: exact within the old subspace."""
        return self._apply(self.Q, self.K, x)

    def squared(self, x):
        """The same for averages of squares, by Q∘Q: exact where coordinates were uncorrelated."""
        return self._apply(jnp.square(self.Q), None if self.K is None else jnp.square(self.K), x)

    def on_refresh(self, rule, *moments):
        """`rule(self, *moments)`, a tuple, where the basis was refit; `moments` untouched on an ordinary step."""
        turned = lambda: tuple(
            new.astype(x.dtype) for new, x in zip(rule(self, *moments), moments, strict=True)
        )
        if not isinstance(
            self.refreshed, jax.core.Tracer
        ):  # outside jit a `cond` is compiled anew on every step
            return turned() if self.refreshed else moments
        return lax.cond(self.refreshed, turned, lambda: moments)

    @staticmethod
    def _apply(Q, K, x):
        x = matmul(Q, x)
        return x if K is None or x.shape[-1] == 1 else matmul(x, K.mT)  # the mass has no columns


def turns(updates, extra) -> Any:
    """A `Turn` for each leaf, from the extra arguments of `low_rank`; None for each where there are none."""
    if "rotation" not in extra:
        return jax.tree.map(lambda _: None, updates)
    columns = extra.get("column_rotation", dict.fromkeys(updates))
    columns_refreshed = extra.get("column_refreshed", dict.fromkeys(updates, False))
    return {
        key: Turn(
            extra["rotation"][key], columns[key], extra["refreshed"][key] | columns_refreshed[key]
        )
        for key in updates
    }
