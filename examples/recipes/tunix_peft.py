"""Tunix: the optimizer is an argument of `PeftTrainer`, which trains all weights of a model without LoRA.

    pip install -e . google-tunix    # run with google-tunix 0.1.7, flax 0.12.8, jax 0.10.2

With LoRA the trainer shows the optimizer nothing but the thin factors: project the whole weights instead. The model is
Tunix's Llama 3, tiny and random, and learns the beginning of this page. `inject_hyperparams` is how Tunix finds the
learning rate that it logs. Gemma in Tunix keeps (heads, d, head_dim), where each head is a matrix; fold them with

    weight_dimension_numbers={
        r"attn/q_einsum": ol.MatrixAxes(1, (0, 2)),
        r"attn/kv_einsum": ol.MatrixAxes(2, (1, 3)),  # (2, heads, d, head_dim): k and v have a basis each
        r"attn/attn_vec_einsum": ol.MatrixAxes((0, 1), 2),
    }
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

import optax_lowrank as ol

TOKENS = jnp.array(list(__doc__.encode()[: 8 * 32])).reshape(8, 32)
CONFIG = ModelConfig(
    num_layers=1,
    vocab_size=128,
    embed_dim=64,
    hidden_dim=160,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
    weight_tying=True,
)


def model_input(batch: TrainingInput) -> dict:
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": build_positions_from_mask(batch.input_mask),
        "attention_mask": make_causal_attn_mask(batch.input_mask),
    }


def main():
    model = Llama3(CONFIG, rngs=nnx.Rngs(0))
    mlp = model.layers[0].mlp  # made of zeros, to be loaded: no gradient would ever reach it
    for i, layer in enumerate((mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        layer.kernel[...] = 0.1 * jax.random.normal(jax.random.key(i), layer.kernel.shape)

    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 4, 20)
    tx = ol.inject_hyperparams(ol.fira)(rate, rank=8)
    trainer = PeftTrainer(model, tx, TrainingConfig(eval_every_n_steps=100, max_steps=20))
    trainer.with_gen_model_input_fn(model_input)
    params = nnx.state(model, nnx.Param)
    print(ol.describe(params, rank=8))

    batch = TrainingInput(input_tokens=TOKENS, input_mask=jnp.ones(TOKENS.shape, bool))
    loss = lambda: trainer.loss_fn(model, **model_input(batch))
    before = loss()
    trainer.train([batch] * 20)
    after = loss()
    print(f"loss {before:.2f} to {after:.2f}")
    assert after < before - 0.5

    # Active: bases of rank 8, of these leaves, in the state that trained, which is smaller than AdamW's.
    state = trainer.optimizer.opt_state
    report = ol.memory_report(tx, params, state)
    print(report)
    kernels = {f"attn/{name}_proj/w" for name in "qkvo"}
    kernels |= {f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    bases = ol.diagnostics(state)
    assert bases.keys() == {f"layers/0/{name}" for name in kernels}
    assert all(basis.rank == 8 for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
