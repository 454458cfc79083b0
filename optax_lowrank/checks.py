"""What is said of wrong arguments: each check raises in Python and names the argument or leaf, the fault, the remedy.

Of numbers only those of Python and NumPy are looked at: an array, which `inject_hyperparams` makes of them, may be
traced, and another one tomorrow.
"""

import contextlib
import inspect
from math import inf
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.views import flatten_by_path


def shown(x: Any) -> str:
    """A value as errors show it: numbers and texts as they are, of all else what it is."""
    if isinstance(x, (str, Real)) or x is None or type(x) is tuple:
        return repr(x)
    return f"`{x.__name__}`" if hasattr(x, "__name__") else f"a `{type(x).__name__}`"


def takes(function: Any, count: int) -> bool:
    """Whether it can be called with so many arguments by position; True where nothing tells."""
    try:
        return bool(inspect.signature(function).bind(*range(count)))
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)


def is_integer(x: Any) -> bool:
    """An int of Python or NumPy."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def number(name: str, x: Any, low=-inf, high=inf, below=None, kind="a number") -> None:
    """Raises TypeError unless it is a number or a scalar array, ValueError unless low ≤ x ≤ high and x < below."""
    if isinstance(x, bool) or not (isinstance(x, Real) or getattr(x, "shape", None) == ()):
        remedy = f"A schedule of it: `inject_hyperparams(optimizer)(..., {name}=schedule)`."
        remedy = remedy if callable(x) else "Give a float, an int or a scalar array."
        raise TypeError(f"`{name}` must be {kind}, got {shown(x)}. {remedy}")
    if isinstance(x, Real) and not (low <= x <= high and (below is None or x < below)):
        need = "not be negative" if low == 0 else f"be at least {low}"
        if below is not None or high < inf:
            need = f"be in [{low}, {high}]" if below is None else f"be in [{low}, {below})"
        raise ValueError(f"`{name}` must {need}, got {x}.")


def rate(name: str, x: Any) -> None:
    """The same for a learning rate, a number that is not negative or a schedule."""
    if not callable(x):
        return number(name, x, 0, kind="a number or a schedule")
    defined = f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', '<locals>')}"
    if not takes(x, 1) or (defined.startswith("optax.") and "<locals>" not in defined):
        raise TypeError(
            f"`{name}` must be a number or a schedule, a function of the count alone, got {shown(x)}. What makes "
            f"schedules must be called: `{name}=optax.cosine_decay_schedule(1e-2, 1000)`."
        )


def integer(name: str, x: Any, low: float = -inf) -> None:
    """Raises TypeError unless it is an int, ValueError if it is smaller than `low`."""
    if not is_integer(x):
        raise TypeError(f"`{name}` must be an int, got {shown(x)}.")
    if x < low:
        raise ValueError(f"`{name}` must be positive, got {x}.")


def dtype(name: str, x: Any, *others: Any) -> None:
    """Raises TypeError unless it is None, a real floating-point dtype, or one of the others."""
    with contextlib.suppress(TypeError):
        if x is None or jnp.issubdtype(x, jnp.floating) or jnp.dtype(x) in others:
            return
    raise TypeError(f"`{name}` must be a dtype of floats, as `jnp.bfloat16`, got {shown(x)}.")


# ------------------------------------------------------------------------------------------------- transformations


def transformation(name: str, x: Any, remedy: str = "") -> None:
    """Raises TypeError unless it has `init` and `update`."""
    if not (hasattr(x, "init") and hasattr(x, "update")):
        remedy = remedy or "Call what makes one: `optax.adam(1e-3)`."
        raise TypeError(f"`{name}` must be an Optax transformation, got {shown(x)}. {remedy}")


class Probed(optax.GradientTransformationExtraArgs):
    """A transformation whose steps go where they should, or are looked at in `init`."""


def trusted(tx: optax.GradientTransformation) -> Probed:
    """What the library has made itself, and need not look at."""
    return Probed(*optax.with_extra_args_support(tx))


def probed(name: str, tx: optax.GradientTransformation, *, downhill: bool) -> Probed:
    """A transformation whose `init` raises ValueError where steps go the wrong way: a learning rate more or less.

    Args:
      name: of the argument.
      tx: tried on one entry of one leaf. What cannot be is taken for right.
      downhill: whether steps are to go against the gradient, as a complete optimizer's do, or along it.
    """
    remedy = "`optax.adam(1e-3)`, say, or `dense_learning_rate=1e-3`." if downhill else ""
    transformation(name, tx, remedy)
    if isinstance(tx, Probed):
        return tx
    tx = optax.with_extra_args_support(tx)

    def init(params):
        along = _along_gradient(tx, params)
        if downhill and along > 0:
            raise ValueError(
                f"`{name}` must be a complete optimizer, and goes uphill: it has no learning rate. Give "
                "`optax.adam(1e-3)`, say, or chain `optax.scale_by_learning_rate` behind it."
            )
        if along < 0 and not downhill:
            raise ValueError(
                f"`{name}` must be a direction, and goes downhill: it has a learning rate, and a second one would turn "
                "it round. Give `optax.scale_by_adam()`, say; a complete optimizer of other leaves is `dense`."
            )
        return tx.init(params)

    return Probed(init, tx.update)


def _along_gradient(tx, params) -> float:
    """u(1) − u(−1) of the update u of one entry, in which decay and noise cancel; 0 where there is no answer."""
    first = iter([True])
    one = jax.tree.map(lambda x: x if next(first, False) else optax.MaskedNode(), params)

    def answer():
        W = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, x.dtype), one)
        updates = [tx.update(g, tx.init(W), W)[0] for g in (W, jax.tree.map(jnp.negative, W))]
        up, down = (jnp.sum(jax.tree.leaves(u)[0]) for u in updates)
        return up - down

    try:
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            return float(jax.jit(answer)())
    except Exception:  # it reads a loss, say, or looks at other leaves
        return 0.0


@contextlib.contextmanager
def noted(note: str):
    """What fails in here says this, too."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


# ----------------------------------------------------------------------------------------------------------- trees


def arrays(params: Any) -> None:
    """Raises TypeError unless every leaf has a shape and a dtype."""
    for path, x in flatten_by_path(params)[0].items():
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise TypeError(
                f"`params` must be arrays or their shapes; leaf {path!r} is {shown(x)}. Take what is trained alone: "
                "`nnx.state(model, nnx.Param)`, `eqx.filter(model, eqx.is_array)`, `variables['params']`."
            )


def state(x: Any, kind: type) -> None:
    """Raises TypeError where something else is given for the state of an optimizer."""
    if not isinstance(x, kind):
        raise TypeError(
            f"`state` must be what `tx.init` makes, a `{kind.__name__}`, got {shown(x)}. It is the second argument of "
            "`update`; a checkpoint is restored into `abstract_state(tx, params, metadata)`."
        )


def weights(what: str, params: Any) -> None:
    """Raises ValueError where the parameters are missing that `what` needs."""
    if params is None:
        raise ValueError(f"{what} needs the weights: call `tx.update(grads, state, params)`.")


def alike(grads: Any, params: Any) -> None:
    """Raises ValueError unless gradients and parameters, where there are any, have the same paths and shapes."""
    if params is None:
        return
    trees = (flatten_by_path(tree)[0] for tree in (grads, params))
    got, want = ({path: jnp.shape(x) for path, x in leaves.items()} for leaves in trees)
    for path in sorted(got.keys() | want.keys()):
        there, here = (shapes.get(path, "missing") for shapes in (got, want))
        if there != here:
            raise ValueError(
                f"the gradient of leaf {path!r} is {there}, the parameter {here}. Call `update` with the gradients of "
                "the parameters that `init` was called for."
            )
