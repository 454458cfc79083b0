"""Two training steps of one Llama: all gradients and then the update, or layer by layer inside the backward pass.

Both begin with the same parameters and take the same steps: `LayerWise` has the layers stacked, and the optimizer on
one of them at a time, so that no more than one layer's gradients and activations live.  Where the optimizer looks at
all gradients together, as clipping by the global norm does, it sees a layer, or everything around the layers, instead.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import optax_lowrank
from lib.llama import Block, Llama, LlamaConfig, abstract_llama, init_params, init_stacked

Apply = Callable[[Any, Any, jax.Array], Any]  # (parameters, updates, key) -> parameters


class TrainState(NamedTuple):
    params: Any
    opt_state: optax.OptState


class Parts(NamedTuple):
    """Of parameters or optimizer states: the layers, stacked, and embedding, last norm and head."""

    layers: Any
    ends: Any


def as_in(like: nnx.State, tree: Any) -> nnx.State:
    """The leaves of `tree` in the containers of `like`: a part of a state is a state, no longer a dict."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def apply_nearest(params: Any, updates: Any, key: jax.Array) -> Any:
    del key
    return optax.apply_updates(params, updates)


def loss_fn(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats per token, of tokens (batch, time + 1)."""
    model = nnx.merge(graph, params)
    return model.loss(model.hidden(tokens[:, :-1]), tokens[:, 1:])


class Whole:
    """All gradients, then the update."""

    def __init__(
        self, config: LlamaConfig, tx: optax.GradientTransformation, apply: Apply = apply_nearest
    ):
        self.config, self.tx, self.apply = config, tx, apply
        self.graph, self.shapes = abstract_llama(config)

    def init_params(self, seed: int) -> nnx.State:
        return init_params(self.config, seed)

    def place(self, params: nnx.State) -> nnx.State:
        """Parameters of a `Llama` as this step has them."""
        return params

    def init(self, params: nnx.State) -> optax.OptState:
        return self.tx.init(params)

    def like(self, saved: Any) -> optax.OptState:
        """Shapes of the optimizer state of a checkpoint, whatever ranks it was compacted to."""
        return optax_lowrank.abstract_state(self.tx, self.shapes, saved)

    def state_shardings(self, params: Any) -> optax.OptState:
        """Where the optimizer state lies, given the shardings of the parameters."""
        return optax_lowrank.state_shardings(self.tx, self.shapes, params)

    def loss(self, params: nnx.State, tokens: jax.Array) -> jax.Array:
        return loss_fn(self.graph, params, tokens)

    def __call__(
        self, state: TrainState, tokens: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(self.loss)(state.params, tokens)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        return TrainState(self.apply(state.params, updates, key), opt_state), loss

    def diagnostics(self, opt_state: optax.OptState) -> dict[str, Any]:
        return optax_lowrank.diagnostics(opt_state)


@contextlib.contextmanager
def nothing_projected() -> Iterator[None]:
    """Without the warning that an optimizer projects nothing, which of what is around the layers is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class LayerWise(Whole):
    """Each layer is updated as soon as its gradient is known; parameters and state are `Parts`."""

    def __init__(
        self, config: LlamaConfig, tx: optax.GradientTransformation, apply: Apply = apply_nearest
    ):
        self.config, self.tx, self.apply = config, tx, apply
        layer = lambda: Block(config, rngs=nnx.Rngs(0))
        ends = lambda: Llama(dataclasses.replace(config, layers=0), rngs=nnx.Rngs(0))
        graphs = [nnx.split(nnx.eval_shape(make), nnx.Param) for make in (layer, ends)]
        self.graphs = Parts(*(graph for graph, _ in graphs))
        self.layer_shapes = graphs[0][1]
        stacked = lambda x: jax.ShapeDtypeStruct((config.layers, *x.shape), x.dtype)
        self.shapes = Parts(jax.tree.map(stacked, self.layer_shapes), graphs[1][1])

    def init_params(self, seed: int) -> Parts:
        return Parts(*init_stacked(self.config, seed))

    def place(self, params: nnx.State) -> Parts:
        layers = [params["layers"][i] for i in range(self.config.layers)]
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
        ends = {name: params[name] for name in self.shapes.ends}
        return Parts(as_in(self.shapes.layers, stacked), as_in(self.shapes.ends, ends))

    def init(self, params: Parts) -> Parts:
        with nothing_projected():
            ends = self.tx.init(params.ends)
        return Parts(jax.vmap(self.tx.init)(params.layers), ends)

    def like(self, saved: Any) -> Parts:
        del saved
        return jax.eval_shape(self.init, self.shapes)

    def state_shardings(self, params: Parts) -> Parts:
        with_axes = lambda tree, change: jax.tree.map(
            lambda x: NamedSharding(x.mesh, PartitionSpec(*change(x.spec))), tree
        )
        layer = with_axes(params.layers, lambda spec: spec[1:])
        state = optax_lowrank.state_shardings(self.tx, self.layer_shapes, layer)
        with nothing_projected():
            ends = optax_lowrank.state_shardings(self.tx, self.shapes.ends, params.ends)
        return Parts(with_axes(state, lambda spec: (None, *spec)), ends)

    def embed(self, ends: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs.ends, ends).hidden(tokens[:, :-1])

    def block(self, layer: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs.layers, layer)(x)

    def head_loss(self, ends: nnx.State, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return nnx.merge(self.graphs.ends, ends).loss(x, tokens[:, 1:])

    def loss(self, params: Parts, tokens: jax.Array) -> jax.Array:
        forward = lambda x, layer: (self.block(layer, x), None)
        x, _ = jax.lax.scan(forward, self.embed(params.ends, tokens), params.layers)
        return self.head_loss(params.ends, x, tokens)

    def __call__(
        self, state: TrainState, tokens: jax.Array, key: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        params, opt_state = state
        # The head is differentiated by what it uses: zeros for the embedding would live through the whole loop.
        head = {k: v for k, v in params.ends.items() if k != "embed" or self.config.tied}
        ends_with = lambda part: as_in(params.ends, {**params.ends, **part})
        embed = lambda part: self.embed(ends_with({"embed": part}), tokens)
        x, pull = jax.vjp(embed, params.ends["embed"])
        done = optax_lowrank.layerwise_step(
            block=self.block,
            tx=self.tx,
            layers=params.layers,
            state=opt_state.layers,
            x=x,
            head_loss=lambda head, x: self.head_loss(ends_with(head), x, tokens),
            head=head,
            apply=lambda layer, updates, i: self.apply(layer, updates, jax.random.fold_in(key, i)),
        )
        (grads,) = pull(done.x_grad)
        if self.config.tied:
            grads = jax.tree.map(jnp.add, grads, done.head_grads["embed"])
        grads = as_in(params.ends, {**done.head_grads, "embed": grads})
        updates, ends_state = self.tx.update(grads, opt_state.ends, params.ends)
        ends = self.apply(params.ends, updates, jax.random.fold_in(key, self.config.layers))
        return TrainState(Parts(done.layers, ends), Parts(done.state, ends_state)), done.loss

    def diagnostics(self, opt_state: Parts) -> dict[str, Any]:
        stacked = jax.vmap(optax_lowrank.diagnostics)(opt_state.layers)
        return {
            f"layers/{i}/{path}": jax.tree.map(lambda x, i=i: x[i], of)
            for i in range(self.config.layers)
            for path, of in stacked.items()
        }


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled step holds at most; an output in a donated buffer counts once."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes
