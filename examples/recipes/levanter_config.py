"""Levanter: register an `OptimizerConfig`, and `optimizer: {type: fira, rank: 128}` in a YAML file builds it.

    pip install --pre marin-levanter jax==0.10.2    # Python 3.12; run with marin-levanter 0.2.227.dev40316220070
    pip install -e .                                # takes optax 0.2.8 against Levanter's pin, which works

A named array is one leaf, and the layers of Haliax say which of its axes are `In` and which are `Out`: `describe` shows
queries of (layer, kv_head, q_heads_per_group, head_size, embed) as a stack of (embed, all heads), and `out_first` makes
no difference. The model is Levanter's Llama, tiny and random, and learns the beginning of this page.
"""

import dataclasses

import draccus
import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import optax
from levanter.layers.attention import AttentionBackend, AttentionMask
from levanter.models.llama import LlamaConfig
from levanter.optim.config import OptimizerConfig
from levanter.trainer_state import TrainerState

import optax_lowrank as ol

TOKENS = jnp.array(list(__doc__.encode()[: 8 * 33])).reshape(8, 33)
Batch, Pos, Vocab = hax.make_axes(batch=8, position=32, vocab=128)


@OptimizerConfig.register_subclass("fira")
@dataclasses.dataclass(frozen=True)
class FiraConfig(OptimizerConfig):
    learning_rate: float = 1e-2
    rank: int = 128

    def build(self, num_train_steps):
        return ol.inject_hyperparams(
            ol.fira
        )(  # so that Levanter finds the learning rate and logs it
            self.lr_scheduler(num_train_steps),
            rank=self.rank,
            weight_decay=self.weight_decay,
            mask=self.build_weight_decay_mask(),
        )


def main():
    config = draccus.decode(OptimizerConfig, {"type": "fira", "rank": 8})
    model = LlamaConfig(
        max_seq_len=Pos.size,
        hidden_dim=64,
        intermediate_dim=160,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        attn_backend=AttentionBackend.VANILLA,
    ).build(Vocab, key=jax.random.key(0))
    state = TrainerState.init(config.build(20), model, key=jax.random.key(1))
    params = state.trainable_model
    print(ol.describe(params, rank=8))

    @eqx.filter_jit
    def train_step(state, tokens):
        def loss(model):
            x = hax.named(tokens[:, :-1], (Batch, Pos))
            logits = model(x, attn_mask=AttentionMask.causal()).rearrange((Batch, Pos, Vocab))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.array, tokens[:, 1:])
            return losses.mean()

        value, grads = eqx.filter_value_and_grad(loss)(state.model)
        state, _ = state.take_step(grads, loss=value, key=state.training_key)
        return state, value

    losses = []
    for _ in range(20):
        state, loss = train_step(state, TOKENS)
        losses.append(loss)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
    assert losses[-1] < losses[0] - 0.5

    # Active: bases of rank 8, one a layer, in the state that trained, which is smaller than AdamW's.
    report = ol.memory_report(state.optimizer, params, state.opt_state)
    print(report)
    linears = {f"self_attn/{name}_proj" for name in "qkvo"}
    linears |= {f"mlp/{name}_proj" for name in ("gate", "up", "down")}
    bases = ol.diagnostics(state.opt_state)
    assert bases.keys() == {f"transformer/layers/stacked/{name}/weight" for name in linears}
    assert all(basis.rank.tolist() == [8, 8] for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
