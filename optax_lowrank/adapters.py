"""Fine-tuning with GradNormLoRP: frozen weights, a low-rank change and a magnitude for every unit of output.

Huang et al., arXiv:2412.19616. Column norms ‖·‖, one a unit of output:

    W = M (W₀ + s I J) / ‖W₀ + s I J‖

Only I, J and M are trained, by any optimizer: an adapter is a tree of parameters, `{path: {"I", "J", "magnitude"}}`.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from optax_lowrank import checks
from optax_lowrank.classify import axes_by_path, views_by_path
from optax_lowrank.rules import wide
from optax_lowrank.views import MatrixView, flatten_by_path


def init(
    params: Any, rank: int, *, axes: Any = None, seed: int = 0, dtype: Any = None
) -> dict[str, dict[str, jax.Array]]:
    """An adapter for every matrix of `params`; merged as it is, it changes nothing.

    I is normal with variance 2 / m (Kaiming), J = 0 and M = ‖W₀‖. Optimizers of this library see I and J as matrices
    and the magnitude as dense. A rank below ρ projects the factors, on their short side, of ρ, as the default
    `side="short"` does: what lasts of their gradients lasts there. A basis of the long side has as few columns as a
    single gradient has, and fits that gradient and no later one. As J = 0, the first gradient of I is zero: its basis
    waits for the next one.

    Args:
      params: a tree of weights, boxed or not: `nnx.split(model, nnx.Param)`, Linen variables, dicts.
      rank: ρ. Matrices with a side no longer than this get no adapter, as in `assemble`.
      axes: overrides of `matrix_axes`; `{"regex": None}` leaves matrices without an adapter.
      seed: of the factors I, which differ between matrices.
      dtype: of the adapter; default float32, or wider where the weight is.

    Returns:
      A dict by path of the weight, of dicts: `"I"` (m, ρ), `"J"` (ρ, n), m the reduction side, and `"magnitude"` (n,).
      A stack of b matrices has I (b, m, ρ), J (b, ρ, n) and a magnitude of (b·n,).

    Raises:
      TypeError, ValueError: `rank` is not a positive int, no matrix is larger than it, overrides do not fit, or a
        chosen weight is not real floating-point.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> params = {"up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}}
      >>> adapter = ol.adapters.init(params, rank=2)
      >>> {name: x.shape for name, x in adapter["up/kernel"].items()}
      {'I': (8, 2), 'J': (2, 32), 'magnitude': (32,)}

    Reference: Huang et al., arXiv:2412.19616; He et al., arXiv:1502.01852, for the variance.
    """
    checks.integer("rank", rank, 1)
    checks.arrays(params)
    leaves, _, views = views_by_path(params, axes, "reduction", strict=True)
    views = {path: view for path, view in views.items() if view and min(view.m, view.n) > rank}
    if not views:
        raise ValueError(
            f"`params` have no matrix with both sides longer than `rank` = {rank}. `optax_lowrank.describe(params)` "
            "shows what is taken for a matrix."
        )
    return {
        path: _identity(path, leaves[path], view, rank, seed, dtype) for path, view in views.items()
    }


def _identity(path, weight, view, rank, seed, dtype):
    """The adapter of one leaf under which its weights stay what they are."""
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(
            f"an adapter needs real floating-point weights; leaf {path!r} is {weight.dtype}."
        )
    W = view.fold(weight).astype(wide(weight))
    dtype = dtype or W.dtype
    batch = (view.batch,) if view.batch > 1 else ()
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    I = jax.random.normal(key, (*batch, view.m, rank), W.dtype) * math.sqrt(2 / view.m)
    return {
        "I": I.astype(dtype),
        "J": jnp.zeros((*batch, rank, view.n), dtype),
        "magnitude": jnp.sqrt(jnp.sum(jnp.square(W), axis=1)).reshape(-1).astype(dtype),
    }


def merge(
    params: Any,
    adapter: dict[str, dict[str, jax.Array]],
    *,
    scale: jax.typing.ArrayLike = 1.0,
    detach_norm: bool = False,
    axes: Any = None,
) -> Any:
    """`params` with the adapter worked in: the same tree for the same model, in training as in inference.

        Z = W₀ + s I J,   W = M Z / ‖Z‖

    Differentiate the loss of the merged weights with respect to the adapter; merge once to serve. With D the gradient
    of W, Z gets (M / ‖Z‖) (D − Ẑ (Ẑ · D)), and M gets Ẑ · D. A column of zeros has no direction: there W = Z.

    Args:
      params: the tree that `init` was called for, or one like it.
      adapter: `{path: {"I", "J", "magnitude"}}`; leaves without one stay as they are.
      scale: s, LoRA's α / ρ; may be traced.
      detach_norm: take ‖Z‖ for a constant in the gradient, which becomes (M / ‖Z‖) D: DoRA's saving of memory.
      axes: the overrides that `init` had.

    Returns:
      A tree like `params`, in the dtypes of `params`; arithmetic is float32 or wider.

    Raises:
      ValueError: the adapter has a path that `params` have not, or shapes that do not fit its weight.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_lowrank as ol
      >>> params, x = {"kernel": jax.random.normal(jax.random.key(0), (8, 16))}, jnp.ones((4, 8))
      >>> apply = lambda params, x: x @ params["kernel"]
      >>> loss = lambda adapter: jnp.mean((apply(ol.adapters.merge(params, adapter), x) - 1) ** 2)
      >>> adapter, tx = ol.adapters.init(params, rank=2), optax.adam(0.05)
      >>> state, before = tx.init(adapter), loss(adapter)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss)(adapter), state)
      ...     adapter = optax.apply_updates(adapter, updates)
      >>> bool(loss(adapter) < 0.1 * before)
      True

    Reference: Huang et al., arXiv:2412.19616; Liu et al., arXiv:2402.09353, for the detached norm.
    """
    leaves, treedef = flatten_by_path(params)
    unknown = [path for path in adapter if path not in leaves]
    if unknown:
        raise ValueError(
            f"the adapter has {unknown}, which `params` have not. Their paths: {list(leaves)}."
        )
    found = axes_by_path(params, axes, strict=False)
    for path, parts in adapter.items():
        view = _fitting_view(path, leaves[path].shape, found[path], parts)
        leaves[path] = _merged(view, leaves[path], parts, scale, detach_norm)
    return treedef.unflatten(leaves.values())


def _merged(view, weight, parts, scale, detach_norm):
    W0 = view.fold(weight).astype(wide(weight))
    I, J, M = (parts[name].astype(W0.dtype) for name in ("I", "J", "magnitude"))
    Z = W0 + scale * jnp.matmul(I, J).reshape(W0.shape)
    square = jnp.sum(jnp.square(Z), axis=1, keepdims=True)
    # the root of a replaced zero: its derivative is infinite at zero
    norm = jnp.sqrt(jnp.where(square > 0, square, 1))
    if detach_norm:
        norm = jax.lax.stop_gradient(norm)
    # one factor a column: where it is 1, as in a new adapter, W is W₀ to the last bit
    W = Z * jnp.where(square > 0, M.reshape(norm.shape) / norm, 1)
    return view.unfold(W).astype(weight.dtype)


def _fitting_view(path, shape, axes, parts):
    shapes = {name: tuple(x.shape) for name, x in parts.items()}
    if axes is not None and set(shapes) == {"I", "J", "magnitude"}:
        view = MatrixView.of(shape, axes, "reduction")
        batch, rank = (view.batch,) if view.batch > 1 else (), shapes["I"][-1:]
        I, J, magnitude = (*batch, view.m, *rank), (*batch, *rank, view.n), (view.batch * view.n,)
        if shapes == {"I": I, "J": J, "magnitude": magnitude}:
            return view
    raise ValueError(
        f"the adapter of leaf {path!r} of shape {shape} has {shapes}, which does not fit its matrix axes, {axes}. "
        "Give `merge` the weights and the `axes` that `init` had."
    )
