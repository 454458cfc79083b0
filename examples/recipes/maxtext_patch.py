"""MaxText: replace the function that makes its optimizers. MaxText's training has NOT been run with it.

    pip install -e . maxtext      # Python 3.12; and MaxText's own requirements

Its trainers, but for reinforcement learning, call `optimizers.get_optimizer`: `patch` it before, with `opt_type=adamw`.

    import maxtext_patch; maxtext_patch.patch()
    from maxtext.trainers.pre_train import train; train.main([...])

MaxText scans layers at axis 1, which no rule of shapes can tell from heads in the output of the attention: a kernel of
(heads, layers, head_dim, embed) would be taken for a stack of (layers * head_dim, embed). `AXES` say it, with and
without `scan_layers`. They are for `self_attention` and `mlp`. For models with other names take the axes that MaxText
finds for its Muon: `weight_dimension_numbers=get_muon_weight_dimension_numbers(model, config)`.

Tried with maxtext 0.2.5, on shapes alone, with dummies for what this does not need, TensorFlow among it: its Llama has
the names and axes of the tree below, and `create_training_optimizer` returns this optimizer. What runs here is the
optimizer on such a tree.
"""

import types

import jax
import optax

import optax_lowrank as ol

AXES = {
    r"self_attention/(query|key|value)/kernel": ol.MatrixAxes(0, (-2, -1)),
    r"self_attention/out/kernel": ol.MatrixAxes((0, -2), -1),
    r"mlp/(wi_0|wi_1|wo)/kernel": ol.MatrixAxes(0, -1),
}


def get_optimizer(config, learning_rate_schedule, model=None, mesh=None, rank=0.25):
    """In place of MaxText's: its schedule, and its Adam's constants."""
    return ol.fira(
        learning_rate_schedule,
        rank=rank,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        mu_dtype=config.mu_dtype,
        weight_decay=config.adam_weight_decay,
        weight_dimension_numbers=AXES,
    )


def patch():
    from maxtext.optimizers import optimizers

    optimizers.get_optimizer = get_optimizer


def llama(embed=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=160, vocab=128) -> dict:
    """Shapes of the parameters of `decoder_block: llama2`."""
    layer = {
        "pre_self_attention_layer_norm": {"scale": (embed, layers)},
        "self_attention": {
            "query": {"kernel": (embed, layers, heads, head_dim)},
            "key": {"kernel": (embed, layers, kv_heads, head_dim)},
            "value": {"kernel": (embed, layers, kv_heads, head_dim)},
            "out": {"kernel": (heads, layers, head_dim, embed)},
        },
        "post_self_attention_layer_norm": {"scale": (embed, layers)},
        "mlp": {
            "wi_0": {"kernel": (embed, layers, mlp)},
            "wi_1": {"kernel": (embed, layers, mlp)},
            "wo": {"kernel": (mlp, layers, embed)},
        },
    }
    head = {"decoder_norm": {"scale": (embed,)}, "logits_dense": {"kernel": (embed, vocab)}}
    return {"token_embedder": {"embedding": (vocab, embed)}, "decoder": {"layers": layer, **head}}


def main():
    shapes, treedef = jax.tree.flatten(llama(), is_leaf=lambda node: isinstance(node, tuple))
    normal = lambda seed: treedef.unflatten(
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), len(shapes)), shapes, strict=True
        )
    )
    params, target = normal(0), normal(1)
    config = types.SimpleNamespace(
        adam_b1=0.9, adam_b2=0.95, adam_eps=1e-8, adam_weight_decay=0.1, mu_dtype=None
    )
    tx = get_optimizer(config, optax.constant_schedule(1e-2), rank=8)
    state = tx.init(params)
    print(ol.describe(params, AXES, rank=8))

    @jax.jit
    def train_step(params, state):
        loss = lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(20):
        params, state, loss = train_step(params, state)
        losses.append(loss)
    print(f"loss {losses[0]:.0f} to {losses[-1]:.0f}")
    assert losses[-1] < 0.9 * losses[0]

    # Active: three bases of rank 8, one a layer, of these leaves, in a state that is smaller than AdamW's.
    report = ol.memory_report(tx, params, state)
    print(report)
    kernels = {f"self_attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    kernels |= {f"mlp/{name}/kernel" for name in ("wi_0", "wi_1", "wo")}
    bases = ol.diagnostics(state)
    assert bases.keys() == {f"decoder/layers/{name}" for name in kernels}
    assert all(basis.rank.tolist() == [8, 8, 8] for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
