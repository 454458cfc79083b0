"""Rules: what a method does with the coordinates of ONE matrix, and how rules are made of others.

A rule knows no batch axis, no path and no other matrix: `low_rank` maps it over stacks and leaves. See `Rule`.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank import checks
from optax_lowrank.linalg import matmul
from optax_lowrank.views import flatten_by_path
from optax_lowrank.walls import after, automatic, when


class Turn(NamedTuple):
    """A change of basis, P_old to P_new, as it acts on coordinates: x ↦ Q x, and on both sides x ↦ Q x Kᵀ."""

    Q: jax.Array  # (r, r), P_newᵀ P_old
    K: jax.Array | None = None  # (r, r), the same of the other side's bases, if it has any

    def __call__(self, x: jax.Array) -> jax.Array:
        """What is linear in the gradient, in the new coordinates: exact within the old subspace."""
        x = matmul(self.Q, x.astype(self.Q.dtype))
        has_columns = self.K is not None and x.shape[-1] == self.K.shape[-1]
        return matmul(x, self.K.mT) if has_columns else x

    def squared(self, x: jax.Array) -> jax.Array:
        """The same for averages of squares, by Q∘Q: exact where coordinates were uncorrelated."""
        return jax.tree.map(jnp.square, self)(x)

    @property
    def of_rows(self) -> "Turn":
        """That of what has one number a row, and no columns to turn."""
        return self._replace(K=None)


def unturned(state: Any, turn: Turn) -> Any:
    """Leaves a state in the old coordinates: the `turn` of a rule that does not look at the basis."""
    del turn
    return state


def put_back(finite: jax.Array, new: Any, old: Any) -> Any:
    """The old state where `finite` is false: the `keep` of most rules."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def in_dtypes_of(old: Any, new: Any) -> Any:
    """The new state in the dtypes of the old one, where a number in float64 has widened an array."""
    kind = lambda x: getattr(x, "dtype", None)
    same = lambda x, y: kind(x) in (None, kind(y))
    return jax.tree.map(lambda x, y: y if same(x, y) else jnp.asarray(y, kind(x)), old, new)


class Rule(NamedTuple):
    """One method on one matrix: a step A of the coordinates and a weight c for each column of the gradient.

        U = P A + G diag(c)

    Args:
      init: `R -> state`, for coordinates of shape (r, n), given as zeros. The state is a tree of arrays.
      turn: `(state, Turn) -> state`, when the basis has changed.
      step: `(R, columns, state, **extra) -> (A, c, state)`; R (r, n) float32 or wider, columns (n,) float32 the squared
        lengths ‖G_j‖², A (r, n) or None for no step, c (n,) or None for none. `extra` holds what Optax was given
        besides, `count`, () int32, the updates so far, `size`, () int, the m of G (m, n), and `finite`, () bool,
        whether R is any good: if not, it is zeros here, and the state is put back; a step without `**` gets nothing of
        it.
      recall: `state -> (r, n)`, coordinates that the next basis should hold besides the gradient, or None.
      keep: `(finite, new, old) -> state`, the old state where `finite`, of R and of the step, is false. A step that
        leaves its state alone there spares a large one the copy, with `lambda finite, new, old: new`.

    Example:
      >>> import jax.numpy as jnp, optax_lowrank as ol
      >>> step = lambda R, columns, state: (jnp.sign(R), None, state)
      >>> sign = ol.Rule(init=lambda R: (), turn=lambda state, turn: state, step=step)
      >>> G = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> tx = ol.low_rank(sign, rank=2, fit=ol.svd())
      >>> tx.update({"w": G}, tx.init({"w": G}))[0]["w"].tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """

    init: Callable[[jax.Array], Any]
    turn: Callable[[Any, Turn], Any]
    step: Callable[..., tuple[jax.Array | None, jax.Array | None, Any]]
    recall: Callable[[Any], jax.Array] | None = None
    keep: Callable[[jax.Array, Any, Any], Any] = put_back


def as_rule(x: Rule | optax.GradientTransformation) -> Rule:
    """A rule as it is, or a transformation of (r, n) coordinates lifted to one.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(x, OfRule):
        return x.rule
    if isinstance(x, Rule):
        takes = inspect.signature(x.step).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in takes):
            return x
        return x._replace(step=lambda R, columns, state, **_: x.step(R, columns, state))
    if not isinstance(x, tuple) or not hasattr(x, "update"):
        got = checks.shown(x)
        raise TypeError(
            f"`low_rank` needs a `Rule` or an Optax transformation, got {got}. Call what makes one."
        )
    return lifted(x)


def lifted(tx: optax.GradientTransformation) -> Rule:
    """The rule A = tx(R) of an Optax transformation; a change of basis leaves its state alone.

    It sees the (r, n) coordinates of one matrix at a time, and as `params` only their shape.
    """
    tx = optax.with_extra_args_support(tx)
    sees = checks.noted(
        "A transformation inside `low_rank` sees the coordinates (r, n) of one matrix, and as `params` their shape and "
        "dtype only. Put what computes with weights (decay, trust ratios) or with several leaves (global norms) "
        "outside: `optax.chain(low_rank(...), ...)`."
    )
    update = sees(tx.update)

    def step(R, columns, state, *, params=None, count=None, size=None, finite=None, **extra):
        del columns, count, size, finite
        # arithmetic with it fails at once, where a `jax.ShapeDtypeStruct` would be traced
        shape = SimpleNamespace(shape=R.shape, dtype=R.dtype, ndim=R.ndim, size=R.size)
        params = shape if params is None else params
        A, new = update(R, state, params, **extra)
        return A, None, in_dtypes_of(state, new)

    return Rule(sees(tx.init), unturned, step)


class OfRule(optax.GradientTransformationExtraArgs):
    """A rule as a transformation of any tree of arrays, which `low_rank` takes for the rule itself."""

    rule: Rule


def of_rule(rule: Rule, batch_axes: int = 0) -> OfRule:
    """Applies a rule to every leaf of a tree, one leaf after the other; each is one matrix, whatever its shape.

    Args:
      rule: whose A is the update; it cannot weigh columns.
      batch_axes: how many leading axes of each leaf count matrices of their own.

    Returns:
      A transformation. Its state is a dict by path.
    """

    def mapped(function):
        for _ in range(batch_axes):
            function = jax.vmap(function)
        return function

    def init(params):
        leaves, _ = flatten_by_path(params)
        if not leaves:  # a scalar, see `low_rank`
            return OfRuleState(jnp.zeros([], jnp.int32), jnp.zeros([]))

        def start(x):
            abstract = isinstance(x, jax.ShapeDtypeStruct)
            return mapped(rule.init)(jnp.zeros(x.shape, wide(x)) if abstract else x.astype(wide(x)))

        return OfRuleState(jnp.zeros([], jnp.int32), {path: start(x) for path, x in leaves.items()})

    def update(updates, state, params=None, **extra):
        leaves, treedef = flatten_by_path(updates)
        weights = flatten_by_path(params)[0] if params is not None else {}
        out, states, before = {}, {}, None
        for path, x in leaves.items():

            def one(g, old, w):
                A, _, new = rule.step(
                    g.astype(wide(g)), None, old, params=w, count=state.count, **extra
                )
                return A.astype(g.dtype), new

            args = (x, state.leaves[path], weights.get(path))
            out[path], states[path] = before = after(before, mapped(one), *args)
        count, states = optax.safe_increment(state.count), states if leaves else state.leaves
        return treedef.unflatten(out.values()), OfRuleState(count, states)

    tx = OfRule(init, automatic(update))
    tx.rule = rule
    return tx


class OfRuleState(NamedTuple):
    """State of a rule that is used as a transformation."""

    count: jax.Array  # () int32, updates so far
    leaves: Any  # dict by path of the rule's states


def repeated(state: Any, batch: int) -> Any:
    """The state of one matrix once for each of a stack."""
    return jax.tree.map(lambda x: jnp.tile(x, (batch, *(1,) * jnp.ndim(x))), state)


class Asked(jax.ShapeDtypeStruct):
    """A shape for which `resize` wants the state at another rank: of a parameter, or of its coordinates.

    Args:
      shape, dtype: of the array that stands for it.
      rank: of the basis; None is the optimizer's own.
      coded: arrays of the rule's state that `quantize_state` is to encode; None are the large ones.
    """

    def __init__(self, shape, dtype, rank: int | None = None, coded: frozenset[str] | None = None):
        super().__init__(shape, dtype)
        self.rank, self.coded = rank, coded

    def __jax_array__(self):
        return jnp.zeros(self.shape, self.dtype)

    def __getattr__(
        self, name
    ):  # methods of arrays: Schedule-Free begins with a `copy` of each parameter
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__jax_array__(), name)


def wide(x: Any) -> Any:
    """The dtype in which an array is computed with: its own, but float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def is_finite(x: jax.Array) -> jax.Array:
    """() bool, whether an array is finite, and its sum of squares: one that overflows would stay in a second moment."""
    return jnp.isfinite(jnp.sum(jnp.square(x.astype(wide(x)))))


# -------------------------------------------------------------------------------------------------- rules of rules


def chained(*rules: Rule | optax.GradientTransformation) -> Rule:
    """Rules one after the other, as `optax.chain`: each gets the A of the one before for its R.

    Args:
      rules: rules or transformations of the coordinates. Columns can be weighed by the last one only.

    Returns:
      A rule.

    Example:
      >>> import optax, optax_lowrank as ol
      >>> natural = ol.chained(ol.scale_by_woodbury_fisher(history=2), ol.scale_by_rotated_adam())
      >>> tx = ol.low_rank(natural, rank=4)
    """
    rules = tuple(map(as_rule, rules))

    def step(R, columns, states, **extra):
        new, c = [], None
        for rule, state in zip(rules, states, strict=True):
            R, c, state = rule.step(R, columns, state, **extra)
            new.append(state)
        return R, c, tuple(new)

    def turn(states, turn):
        return tuple(rule.turn(state, turn) for rule, state in zip(rules, states, strict=True))

    return Rule(
        init=lambda R: tuple(rule.init(R) for rule in rules),
        turn=unturned if all(rule.turn is unturned for rule in rules) else turn,
        step=step,
        keep=lambda finite, new, old: tuple(
            rule.keep(finite, *pair) for rule, *pair in zip(rules, new, old, strict=True)
        ),
    )


class AccumulatedState(NamedTuple):
    """State of `accumulated`."""

    mean: jax.Array  # (r, n), this window's micro-batches so far, their sum divided by k; zeros again after the last
    inner: Any


def accumulated(rule: Rule | optax.GradientTransformation, k: int) -> Rule:
    """Gives a rule the mean of k micro-batches; the steps of all but the last of them are zero.

    Projection is linear while the basis stands, so the mean of the coordinates is the coordinates of the mean: r·n
    floats a matrix, where `optax.MultiSteps` around the optimizer keeps m·n. The basis must stand for a window:
    `low_rank(accumulated(rule, k), refresh=in_windows(policy, k))`. The argument `accumulate` of the aliases does it
    all.

    A micro-batch that is not finite counts as zero; if it is the last of a window, its matrix steps at the end of the
    next.

    Args:
      rule: of one matrix; it cannot weigh columns, which needs the mean of whole gradients.
      k: micro-batches of a window, ≥ 1; 1 makes it the rule itself.

    Returns:
      A rule.

    Raises:
      ValueError: k < 1, or the rule weighs columns (at the first update).

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> tx = ol.low_rank(ol.accumulated(optax.identity(), k=2), rank=2, refresh=ol.in_windows(ol.every(9), k=2))
      >>> state = tx.init({"w": jnp.eye(2)})
      >>> for size in (1.0, 3.0):
      ...     update, state = tx.update({"w": size * jnp.eye(2)}, state)
      ...     print(jnp.diag(update["w"]).round(5).tolist())
      [0.0, 0.0]
      [2.0, 2.0]
    """
    if not checks.is_integer(k) or k < 1:
        raise ValueError(f"`accumulate` must be a positive number of micro-batches, got {k!r}.")
    rule = as_rule(rule)
    if k == 1:
        return rule

    def turn(state, turn):
        # a basis that is refit late, after bad gradients, turns what the window has summed so far
        return AccumulatedState(turn(state.mean), rule.turn(state.inner, turn))

    def step(R, columns, state, *, count, finite=True, **extra):
        del columns
        state = state._replace(mean=state.mean + R / k)  # R is zeros where it is not finite

        def end(at):
            _, (mean, old) = at
            A, c, new = rule.step(mean, None, old, count=count // k, finite=finite, **extra)
            if c is not None:
                raise ValueError(
                    "`accumulated` sums coordinates; a rule that weighs columns needs whole gradients."
                )
            taken = finite & is_finite(A)
            return A, AccumulatedState(jnp.where(taken, 0, mean), rule.keep(taken, new, old))

        last = (count + 1) % k == 0
        A, state = when(last, end, (R, state))
        return jnp.where(last, A, 0), None, state

    # the step itself puts back what must be, so that the loop of `when` writes in place
    init = lambda R: AccumulatedState(jnp.zeros_like(R), rule.init(R))
    return Rule(init, turn, step, keep=lambda finite, new, old: new)
