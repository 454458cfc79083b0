"""Layer-wise update: the optimizer runs inside the backward pass, so that one layer's gradient lives at a time.

And stochastic rounding, for weights that leave no room for a float32 copy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowrank.walls import entry, put


class LayerwiseStep(NamedTuple):
    """What `layerwise_step` returns."""

    loss: jax.Array  # ()
    layers: Any  # parameters after the update, (L, ...) a leaf
    state: Any  # optimizer state after the update, (L, ...) a leaf
    head_grads: Any  # like `head`
    x_grad: Any  # like `x`


def layerwise_step(
    block: Callable[[Any, Any], Any],
    tx: optax.GradientTransformation,
    layers: Any,
    state: Any,
    x: Any,
    head_loss: Callable[[Any, Any], jax.Array],
    head: Any,
    apply: Callable[[Any, Any, jax.Array], Any] | None = None,
) -> LayerwiseStep:
    """One training step of a stack of equal layers, each updated as soon as its gradient is known.

    Forward, keeping only the inputs, then backward, where a layer's activations are computed anew:

        x_{i+1} = block(W_i, x_i),  loss = head_loss(head, x_L);
        dW_i, dx_i = vjp of block at (W_i, x_i) on dx_{i+1};  W_i <- W_i + tx(dW_i)      i = L − 1, …, 0.

    The result is that of the whole gradient and then `tx` on every layer by itself. It saves the gradients of all
    layers but one; so whatever needs them together is not to be had: `optax.clip_by_global_norm` in `tx` clips each
    layer by its own norm. Micro-batches are accumulated by a `tx` that keeps their sum in the subspace, with the
    argument `accumulate` of the aliases; `optax.MultiSteps` around `tx` works, and keeps all gradients in its state.
    Jit it with `layers` and `state` donated: both are then updated in place.

    Args:
      block: `(parameters of one layer, x) -> x` of the same shape and dtype.
      tx: a complete optimizer for one layer, whose state is `jax.vmap(tx.init)(layers)`. What `low_rank` derives from
        paths and positions is then equal in all layers: random sketches (`gaussian()` has one basis for all of them;
        that of `randomized_svd()` follows each gradient) and the phases of `every(n, stagger=True)`.
      layers: parameters, stacked on axis 0, (L, ...) a leaf.
      state: of `tx`, stacked likewise; `jax.vmap(diagnostics)` reads it, `diagnostics` one layer of it.
      x: input of the first layer, as from an embedding; its gradient is returned, to be pulled back to that.
      head_loss: `(head, x) -> ()` loss of the last layer's output.
      head: whatever else the loss is to be differentiated by; its gradients are for an ordinary transformation.
      apply: `(layer, updates, i) -> layer`, i the index of the layer, () int32; default `optax.apply_updates`. See
        `apply_rounded` for bfloat16.

    Returns:
      A `LayerwiseStep`.

    Raises:
      ValueError: `layers` or `state` is not stacked.
      TypeError: `block` returns another shape or dtype than its input's.

    Example:
      >>> import jax, jax.numpy as jnp, optax_lowrank as ol
      >>> block = lambda layer, x: x + jnp.tanh(x @ layer["kernel"])
      >>> head_loss = lambda head, x: jnp.mean((x @ head - 1) ** 2)
      >>> layers, head = {"kernel": jnp.zeros((3, 8, 8))}, jnp.ones((8, 1)) / 8
      >>> x = jax.random.uniform(jax.random.key(0), (16, 8))
      >>> tx = ol.galore(0.03, rank=2)
      >>> state = jax.vmap(tx.init)(layers)
      >>> step = jax.jit(lambda layers, state: ol.layerwise_step(block, tx, layers, state, x, head_loss, head))
      >>> losses = []
      >>> for _ in range(10):
      ...     loss, layers, state, *_ = step(layers, state)
      ...     losses.append(loss)
      >>> bool(losses[-1] < losses[0] / 2)
      True

    Reference: Lv et al., arXiv:2306.09782 (LOMO); Zhao et al., arXiv:2403.03507, "per-layer weight updates". Theirs are
      hooks on each parameter; a loop over a stack of layers is ours.
    """
    if apply is None:
        apply = lambda layer, updates, i: optax.apply_updates(layer, updates)
    count = len(jax.tree.leaves(layers)[0])
    _check_stacked("layers", layers, count)
    _check_stacked("state", state, count)

    def forward(x, layer):
        return block(layer, x), x

    x, inputs = jax.lax.scan(forward, x, layers)
    loss, (head_grads, x_grad) = jax.value_and_grad(head_loss, argnums=(0, 1))(head, x)

    def backward(step, carry):
        # The stacks are in the carry, for a scan would return new ones beside the old. A layer is written one turn
        # late: were a stack read and written in the same turn, XLA would copy all of it to keep the two in order.
        stacks, updated, x_grad = carry
        i = count - 1 - step
        stacks = put(stacks, i + 1, updated)
        layer, layer_state = entry(stacks, i)
        _, pull = jax.vjp(block, layer, entry(inputs, i))
        grads, x_grad = pull(x_grad)
        updates, layer_state = tx.update(grads, layer_state, layer)
        return stacks, (apply(layer, updates, i), layer_state), x_grad

    # The first turn writes to the index `count`, which JAX clamps: the last layer, as it is.
    stacks = (layers, state)
    carry = (stacks, entry(stacks, count - 1), x_grad)
    stacks, updated, x_grad = jax.lax.fori_loop(0, count, backward, carry)
    layers, state = put(stacks, 0, updated)
    return LayerwiseStep(loss, layers, state, head_grads, x_grad)


def apply_rounded(params: Any, updates: Any, key: jax.Array) -> Any:
    """Applies updates to bfloat16 parameters with stochastic rounding: W ← round(W + U), exact on average.

    A bfloat16 number has 8 significant bits, so `optax.apply_updates` loses every update below W / 512. Here the sum is
    one of float32; of its two neighbours in bfloat16 one is drawn, the nearer one with the greater probability, such
    that the mean is the sum. Parameters of any other dtype take `optax.apply_updates`.

    Args:
      params: any tree of arrays.
      updates: like `params`.
      key: a new one for every step, and layer: `jax.random.fold_in(jax.random.key(seed), step)`.

    Returns:
      A tree like `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_lowrank as ol
      >>> weights, updates = jnp.ones(10_000, jnp.bfloat16), jnp.full(10_000, 1e-3)
      >>> float(optax.apply_updates(weights, updates).astype(float).mean())
      1.0
      >>> rounded = ol.apply_rounded(weights, updates, jax.random.key(0))
      >>> round(float(rounded.astype(float).mean()), 3)
      1.001

    Reference: Zamirai et al., arXiv:2010.06192, "Revisiting BFloat16 Training".
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))

    def leaf(key, p, u):
        if p.dtype != jnp.bfloat16:
            return optax.apply_updates(p, u)
        exact = p.astype(jnp.float32) + u.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(exact, jnp.uint32)
        noise = jax.random.bits(key, p.shape, jnp.uint16).astype(jnp.uint32)
        # the lower half of a float32 is what bfloat16 has not: a carry out of it is a step to the neighbour
        drawn = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(exact), drawn, exact).astype(jnp.bfloat16)

    return treedef.unflatten(map(leaf, keys, leaves, treedef.flatten_up_to(updates)))


def _check_stacked(name, tree, count):
    for path, leaf in jax.tree.leaves_with_path(tree):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"`{name}` must have the layers on axis 0 of every leaf, {count} of them; {jax.tree_util.keystr(path)} "
                f"is {leaf.shape}. The state of a stack is `jax.vmap(tx.init)(layers)`."
            )
