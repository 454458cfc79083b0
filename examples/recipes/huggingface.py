"""Hugging Face checkpoints: a Llama in `safetensors`, trained as a Flax tree and written back.

    pip install -e . flax safetensors     # run with safetensors 0.8.0, jax 0.10.2

`transformers` 5 has no Flax models, but its checkpoints are read without it: a file keeps `q_proj.weight` as (out, in),
Flax keeps `q_proj/kernel` as (in, out), and the rest of the name is the path. This page makes a tiny random checkpoint
to start from; give `read` the `model.safetensors` of a real one instead.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from safetensors.flax import load_file, save_file

import optax_lowrank as ol

TOKENS = jnp.array(list(__doc__.encode()[: 8 * 33])).reshape(8, 33)
WIDTH, FFN, HEADS = 64, 160, 4
LEAVES = {"proj": "kernel", "head": "kernel", "tokens": "embedding", "norm": "scale"}


def read(file: Path) -> dict:
    """`model.layers.0.mlp.up_proj.weight`, (out, in), becomes `model/layers/0/mlp/up_proj/kernel`, (in, out)."""
    tree = {}
    for name, x in load_file(file).items():
        *modules, _ = name.split(".")
        leaf = LEAVES[modules[-1].rpartition("_")[2].replace("layernorm", "norm")]
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = x.T if leaf == "kernel" else x
    return tree


def write(file: Path, params: dict) -> None:
    """The inverse of `read`: `transformers` finds the trained weights under its own names."""
    tensors = {}
    for path, x in jax.tree.leaves_with_path(params):
        *modules, leaf = (key.key for key in path)
        tensors[".".join([*modules, "weight"])] = x.T if leaf == "kernel" else x
    save_file(tensors, file, metadata={"format": "pt"})


def llama(params, tokens):
    def norm(p, x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"][None, None]

    def rope(x):  # turns the halves of a head, not neighbours
        a, b = jnp.split(x, 2, -1)
        speeds = 1e4 ** -jnp.linspace(0, 1, a.shape[-1], endpoint=False)
        angles = jnp.outer(jnp.arange(x.shape[1]), speeds)[None, :, None]
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    dense = lambda p, x: x @ p["kernel"]
    heads = lambda x: x.reshape(*x.shape[:2], HEADS, -1)
    x = params["model"]["embed_tokens"]["embedding"][tokens]
    for i in range(len(params["model"]["layers"])):
        layer = params["model"]["layers"][str(i)]
        attention, mlp = layer["self_attn"], layer["mlp"]
        h = norm(layer["input_layernorm"], x)
        q, k, v = (heads(dense(attention[f"{name}_proj"], h)) for name in "qkv")
        h = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + dense(attention["o_proj"], h.reshape(x.shape))
        h = norm(layer["post_attention_layernorm"], x)
        gate, up = dense(mlp["gate_proj"], h), dense(mlp["up_proj"], h)
        x = x + dense(mlp["down_proj"], jax.nn.silu(gate) * up)
    return dense(params["lm_head"], norm(params["model"]["norm"], x))


def tiny_checkpoint(file: Path) -> None:
    sizes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    sizes |= {f"mlp.{name}_proj": (FFN, WIDTH) for name in ("gate", "up")}
    sizes |= {"mlp.down_proj": (WIDTH, FFN), "input_layernorm": (WIDTH,)}
    sizes |= {"post_attention_layernorm": (WIDTH,)}
    sizes = {f"model.layers.0.{name}": size for name, size in sizes.items()}
    sizes |= {name: (128, WIDTH) for name in ("model.embed_tokens", "lm_head")}
    sizes |= {"model.norm": (WIDTH,)}
    normal = lambda key, size: (
        jax.random.normal(key, size) / 8 if len(size) == 2 else jnp.ones(size)
    )
    keys = jax.random.split(jax.random.key(0), len(sizes))
    tensors = {f"{n}.weight": normal(key, sizes[n]) for n, key in zip(sizes, keys, strict=True)}
    save_file(tensors, file, metadata={"format": "pt"})


def main():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        tiny_checkpoint(file)
        params = read(file)
        tx = ol.fira(1e-2, rank=8)
        state = tx.init(params)
        print(ol.describe(params, rank=8))

        @jax.jit
        def train_step(params, state, tokens):
            def loss(params):
                logits, targets = llama(params, tokens[:, :-1]), tokens[:, 1:]
                return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(20):
            params, state, loss = train_step(params, state, TOKENS)
            losses.append(loss)
        print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
        assert losses[-1] < losses[0] - 0.5

        before = load_file(file)
        write(file, params)
        after = load_file(file)
        assert {k: x.shape for k, x in after.items()} == {k: x.shape for k, x in before.items()}
        assert jax.tree.all(jax.tree.map(jnp.array_equal, read(file), params))

    # Active: bases of rank 8, of these leaves, in the state that trained, which is smaller than AdamW's.
    report = ol.memory_report(tx, params, state)
    print(report)
    kernels = {f"self_attn/{name}_proj" for name in "qkvo"}
    kernels |= {f"mlp/{name}_proj" for name in ("gate", "up", "down")}
    bases = ol.diagnostics(state)
    assert bases.keys() == {f"model/layers/0/{name}/kernel" for name in kernels}
    assert all(basis.rank == 8 for basis in bases.values())
    assert report.state < 0.5 * report.adamw


if __name__ == "__main__":
    main()
