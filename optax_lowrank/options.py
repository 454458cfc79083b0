"""What all optimizers of the library share: their options, their signatures, and which of them can be schedules."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

from optax_lowrank import checks
from optax_lowrank.assemble import assemble
from optax_lowrank.bases import Basis, InCodes, InDtype
from optax_lowrank.classify import Rank, check_rank
from optax_lowrank.fits import Fit, check_fit
from optax_lowrank.low_rank import Geometry, Side, low_rank
from optax_lowrank.moments import rotated, scale_by_rotated_adam
from optax_lowrank.quantize import quantize_state
from optax_lowrank.refresh import Policy, as_policy
from optax_lowrank.rules import Rule, accumulated, lifted
from optax_lowrank.walls import AxisName, automatic

# 8 or 4, or the arguments of `quantize_state`.
StateBits = Literal[8, 4] | Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Options of every optimizer.

    Where Optax has a name for one, this is it; the core has a shorter one of its own. `update_proj_gap` here is
    `refresh` in `low_rank`, `weight_dimension_numbers` is `axes` in `low_rank`, `assemble` and `adapters.init`
    (`overrides` in `matrix_axes` and `describe`), and `base_optimizer` of `galore` is `rule` in `low_rank` and `inner`
    in `assemble`.

    Args:
      rank: r, an int; a share of the projected side in (0, 1), rounded to a multiple of 8; or a dict {regex: int or
        share} by path, 128 where nothing matches. Matrices with a side no longer than their rank (of a share, that of
        their shorter side) are not projected.
      update_proj_gap: T, optimizer updates between refits, which may be traced; or a refresh policy, such as
        `every(200, stagger=True)`.
      scale: α, multiplies the step in the subspace only.
      b1, b2, eps, mu_dtype: of Adam.
      weight_decay: λ, decoupled, in full space.
      mask: which leaves decay, as in `optax.adamw`.
      weight_dimension_numbers: which axes make the matrix: overrides of `matrix_axes`; `GaLoreDimensionNumbers` are
        accepted, and axes named in neither of their fields are batch axes.
      fit: how a basis is chosen; default `randomized_svd()`. The papers' is `svd()`; `seeded()` and `dct()` store no
        basis.
      side: "short", "long" or "both", the side of a matrix that is projected.
      rotate_moments: carry the moments over to the new basis at a refit.
      dense: a complete transformation for the leaves that are not projected, with a learning rate and weight decay of
        its own.
      dense_learning_rate: in place of `dense`, the rate of Adam on those leaves; otherwise it is `learning_rate`, which
        no `scale` makes smaller there.
      state_bits: 8 or 4 keeps moments as codes (`quantize_state`) and bases in bfloat16; a dict of arguments of
        `quantize_state`, such as {"min_size": 256}, does so in its own way.
      accumulate: k micro-batches that make one update. Their gradients are summed in the subspace (`accumulated`), and
        updates in between are zero; `update_proj_gap` and schedules count the real ones, those of `inject_hyperparams`
        every call.
      seed: of the random sketches.
      axis_name: inside `jax.shard_map`, the mesh axes along which gradients differ, each device having those of its own
        batch. The optimizer averages them, matrices as coordinates, r · n numbers instead of m · n (whole where a
        method weighs columns: `fira`, `apollo`, `low_rank_muon`), the other leaves as they are. What clips in front of
        it sees each device's own gradient.
    """

    rank: Rank = 128
    update_proj_gap: int | Policy = 200
    scale: jax.typing.ArrayLike = 0.25
    b1: jax.typing.ArrayLike = 0.9
    b2: jax.typing.ArrayLike = 0.999
    eps: jax.typing.ArrayLike = 1e-8
    mu_dtype: Any = None
    weight_decay: jax.typing.ArrayLike = 0.0
    mask: Any = None
    weight_dimension_numbers: Any = None
    fit: Fit | Basis | None = None
    side: Side = "short"
    rotate_moments: bool = False
    dense: optax.GradientTransformation | None = None
    dense_learning_rate: optax.ScalarOrSchedule | None = None
    state_bits: StateBits = None
    accumulate: int = 1
    seed: int = 0
    axis_name: AxisName = None

    def __post_init__(self):
        check_rank(self.rank)
        as_policy(self.update_proj_gap)
        if self.fit is not None:
            check_fit(self.fit)
        for name in ("scale", "eps", "weight_decay"):
            checks.number(name, getattr(self, name), 0)
        for name in ("b1", "b2"):
            checks.number(name, getattr(self, name), 0, below=1)
        checks.dtype("mu_dtype", self.mu_dtype)
        if self.dense_learning_rate is not None:
            checks.rate("dense_learning_rate", self.dense_learning_rate)
        if self.dense is not None and self.dense_learning_rate is not None:
            raise ValueError(
                "give `dense` or `dense_learning_rate`, not both: `dense` has a rate of its own."
            )
        bits = self.state_bits
        is_size = checks.is_integer(bits) and bits in (8, 4)
        if not (bits is None or is_size or isinstance(bits, Mapping)):
            raise ValueError(
                "`state_bits` must be None, 8, 4 or a dict of arguments of `quantize_state`, got "
                f"{bits!r}."
            )
        for name in self.bits.keys() - inspect.signature(quantize_state).parameters.keys():
            raise TypeError(
                f"`state_bits` has arguments of `quantize_state`, and {name!r} is none of them."
            )

    @property
    def _eps(self):
        # with 0 the step of a row of zeros, which a gradient of small rank has, would be 0 / 0
        is_zero = isinstance(self.eps, (int, float)) and self.eps == 0
        return float(jax.numpy.finfo("float32").tiny) if is_zero else self.eps

    def adam(self) -> optax.GradientTransformation:
        """Adam for leaves that are not projected."""
        return optax.scale_by_adam(self.b1, self.b2, self._eps, mu_dtype=self.mu_dtype)

    def moments(self, base: optax.GradientTransformation | None = None) -> Rule:
        """The rule of Adam in the subspace, or of a transformation in its place."""
        if base is not None:
            checks.transformation("base_optimizer", base, "Call it: `optax.scale_by_lion()`.")
        if not self.rotate_moments:
            return self.coded(lifted(base or self.adam()))
        adam = scale_by_rotated_adam(self.b1, self.b2, self._eps, self.mu_dtype)
        return self.coded(adam if base is None else rotated(base))

    def coded(self, rule: Rule) -> Rule:
        """A rule with its state in `state_bits`."""
        return rule if self.state_bits is None else quantize_state(rule, **self.bits).rule

    @property
    def bits(self) -> dict[str, Any]:
        """Arguments of `quantize_state`."""
        bits = self.state_bits
        return dict(bits) if isinstance(bits, Mapping) else {"bits": bits}

    def needs_whole_gradients(self, method: str, what: str) -> None:
        """Raises where a method that weighs columns of the gradient cannot do what is asked."""
        if self.accumulate != 1:
            raise ValueError(
                f"`accumulate` must be 1 in `{method}`, got {self.accumulate}: {what} needs whole gradients. Wrap the "
                "optimizer in `optax.MultiSteps`, or use `galore`."
            )
        if self.side == "both":
            raise ValueError(
                f'`side` must be "short" or "long" in `{method}`: {what} is scaled column by column.'
            )

    def projected(
        self,
        rule: Rule,
        *,
        scale: jax.typing.ArrayLike = 1.0,
        geometry: Geometry | None = None,
        basis_bits: Literal[8, 4] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """`low_rank` with these options, and bases in bfloat16 beside codes of moments, or in codes on request."""
        floats = InDtype(None if self.state_bits is None else jax.numpy.bfloat16)
        return low_rank(
            accumulated(rule, self.accumulate),
            rank=self.rank,
            fit=self.fit,
            refresh=as_policy(self.update_proj_gap, self.accumulate),
            axes=self.weight_dimension_numbers,
            side=self.side,
            scale=scale,
            seed=self.seed,
            basis_store=floats if basis_bits is None else InCodes(basis_bits),
            geometry=geometry,
            axis_name=self.axis_name,
        )

    def optimizer(
        self,
        learning_rate: optax.ScalarOrSchedule,
        matrix: optax.GradientTransformation,
        *,
        inner: optax.GradientTransformation | None = None,
        owns_learning_rate: bool = False,
    ) -> optax.GradientTransformationExtraArgs:
        """`assemble` with these options."""
        right = checks.trusted(self.adam()) if inner is None else inner
        inner = checks.probed("base_optimizer", right, downhill=False)
        if self.state_bits is not None:
            inner = checks.trusted(quantize_state(inner, **self.bits))
        assembled = functools.partial(
            assemble, rank=self.rank, inner=inner, weight_decay=self.weight_decay, mask=self.mask
        )
        dense = self.dense
        if self.dense_learning_rate is not None:
            none = lambda tree: jax.tree.map(lambda _: None, tree)
            dense = assembled(optax.identity(), self.dense_learning_rate, axes=none)
            dense = checks.trusted(dense)
        return assembled(
            matrix,
            learning_rate,
            dense=dense,
            axes=self.weight_dimension_numbers,
            owns_learning_rate=owns_learning_rate,
            accumulate=self.accumulate,
            axis_name=self.axis_name,
        )


# ------------------------------------------------------------------------------------------------------ signatures


def alias(
    *,
    positional: tuple[str, ...] = ("rank", "update_proj_gap", "scale"),
    without: tuple[str, ...] = (),
    **defaults: Any,
) -> Callable[[Callable], Callable]:
    """Decorator of an optimizer `f(learning_rate, *, ..., **options)`: signature and docstring show every option.

    Args:
      positional: arguments that may be given by position, after the learning rate.
      without: options that this optimizer has not.
      defaults: options whose default is its own.
    """

    def decorate(function):
        rate, *own, _ = inspect.signature(function).parameters.values()  # the last is `options`
        of_all = inspect.signature(Options).parameters.values()
        shared = [p for p in of_all if p.name not in without]
        every = {
            p.name: p.replace(default=defaults.get(p.name, p.default)) for p in [*shared, *own]
        }
        first = [every.pop(name).replace(kind=rate.kind) for name in positional if name in every]
        signature = inspect.Signature(
            [rate, *first, *every.values()], return_annotation=optax.GradientTransformationExtraArgs
        )

        @functools.wraps(function)
        def optimizer(*args, **kwargs):
            bound = _bound(function.__name__, signature, args, kwargs)
            return function(**{**defaults, **bound.arguments})

        optimizer.__signature__ = signature
        optimizer.__doc__ = _with_options(function.__doc__, {p.name for p in shared})
        return optimizer

    return decorate


# Names of the core, and Optax's for the same, which the optimizers have.
_OF_OPTAX = {"refresh": "update_proj_gap", "axes": "weight_dimension_numbers"}


def _bound(optimizer: str, signature, args, kwargs):
    """The arguments by name; of one that there is not, the error has the nearest that there is."""
    for name in kwargs.keys() - signature.parameters.keys():
        near = difflib.get_close_matches(_OF_OPTAX.get(name, name), signature.parameters, 1)
        remedy = (
            f"Did you mean `{near[0]}`?" if near else f"It has {', '.join(signature.parameters)}."
        )
        raise TypeError(f"`{optimizer}` has no argument `{name}`. {remedy}")
    return signature.bind(*args, **kwargs)


def _with_options(doc: str, names: set[str]) -> str:
    """A docstring whose line `**options` of its Args is replaced by what `Options` says of these names."""
    text = inspect.cleandoc(Options.__doc__).split("Args:\n")[1]
    entries = re.split(r"\n(?=  \S)", text)
    keep = [e for e in entries if {n.strip() for n in e.split(":")[0].split(",")} & names]
    lines = textwrap.indent("\n".join(keep), "    ")
    return doc.replace("      **options: see `Options`.", lines)


# ------------------------------------------------------------------------------------------------------- schedules

# Numbers that a step computes with. All others set shapes, or what is traced.
_TRACED = {
    "learning_rate", "dense_learning_rate", "update_proj_gap", "scale", "b1", "b2", "eps", "weight_decay", "limit",
    "residual_scale", "damping", "max_residual_energy", "min_rank", "rank_step", "on_convergence", "beta",
    "consistent_rms",
}  # fmt: skip


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation], hyperparam_dtype: Any = None
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams` for the optimizers of this library: every number can be a schedule, or says why not.

    Args:
      factory: an optimizer, such as `fira`.
      hyperparam_dtype: of the numbers in the state; default float32, or float64 where JAX has it. Optax's is that of
        the first parameter, and in bfloat16 a b2 of 0.999 is 1.

    Returns:
      A factory with the same arguments, whose numbers may be schedules of the calls of `update` and live in the
      state's `hyperparams`. A refresh policy, a basis and a dtype are callable, too, and stay what they are.

    Raises:
      TypeError: `factory` is an optimizer already; from the factory, a schedule or an array for an argument that sets
        shapes or code.

    Example:
      >>> import jax.numpy as jnp, optax, optax_lowrank as ol
      >>> tx = ol.inject_hyperparams(ol.fira)(1e-2, rank=2, limit=optax.linear_schedule(2.0, 1.01, 100))
      >>> state = tx.init({"kernel": jnp.ones((8, 16))})
      >>> float(state.hyperparams["limit"])
      2.0
    """
    if not callable(factory):
        raise TypeError(
            f"`factory` must be what makes an optimizer, got {checks.shown(factory)}. The arguments come after it: "
            "`inject_hyperparams(fira)(1e-2, rank=32)`."
        )
    signature = inspect.signature(factory)

    def injected(*args, **kwargs):
        bound = _bound(getattr(factory, "__name__", "optimizer"), signature, args, kwargs)
        static = {name for name in signature.parameters if name not in _TRACED}
        if "weight_decay" in signature.parameters.keys() - bound.arguments.keys():
            static.add("weight_decay")  # as a number that may change, it would ask for the weights
        for name, value in bound.arguments.items():
            default = signature.parameters[name].default
            numeric = isinstance(default, (int, float)) or name in ("state_bits", "basis_bits")
            if name in static and numeric and (isinstance(value, jax.Array) or _is_schedule(value)):
                raise TypeError(
                    f"`{name}` cannot be a schedule or an array: it sets shapes or code, so that each value is another "
                    "program. Make a new optimizer, and see `resize` for ranks."
                )
            if name != "learning_rate" and callable(value) and not _is_schedule(value):
                static.add(name)  # a policy
        dtype = jax.numpy.result_type(float) if hyperparam_dtype is None else hyperparam_dtype
        inject = optax.inject_hyperparams(factory, tuple(static), hyperparam_dtype=dtype)
        tx = inject(*bound.args, **bound.kwargs)
        # the numbers are in the state, but in the optimizer that is made of them they are no arguments any more
        return optax.GradientTransformationExtraArgs(tx.init, automatic(tx.update))

    injected.__signature__ = signature
    return injected


def _is_schedule(x) -> bool:
    """Whether it is called with a count alone; a policy takes statistics as well, a dtype is a class."""
    return callable(x) and not isinstance(x, type) and checks.takes(x, 1)
