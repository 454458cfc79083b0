"""A method of your own is a `Rule` of one matrix. This one: momentum inside the basis, the gradient itself outside.

U = P M + (G - P R),  M <- 0.9 M + R        in the core's terms, U = P A + G diag(c):  A = M - R,  c = 1
"""

import jax
import jax.numpy as jnp
import optax

import optax_lowrank as ol


def step(R, columns, M):
    """Of coordinates (r, n), squared lengths of the gradient's columns (n,), and the state."""
    M = 0.9 * M + R
    return M - R, jnp.ones(R.shape[1]), M


mine = ol.Rule(init=jnp.zeros_like, turn=lambda M, turn: turn(M), step=step)
METHODS = {
    "mine": lambda rate: ol.assemble(ol.low_rank(mine, rank=8, refresh=ol.every(20)), rate, rank=8),
    "galore": lambda rate: ol.galore(rate, rank=8, update_proj_gap=20),
}
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
x, target = normal(0, 256, 32) * jnp.logspace(0, -1, 32)[None], normal(1, 32, 48)
# without noise, and a quadratic: it suits momentum, and says nothing about a transformer
loss_fn = lambda params: jnp.sum((x @ (params["kernel"] - target)) ** 2) / len(x)


def train(rate: jax.Array, make, steps: int = 200) -> jax.Array:
    tx, params = make(lambda count: rate), {"kernel": jnp.zeros_like(target)}

    def one(carry, _):
        updates, state = tx.update(jax.grad(loss_fn)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    (params, _), _ = jax.lax.scan(one, (params, tx.init(params)), length=steps)
    return loss_fn(params)


if __name__ == "__main__":
    for name, make in METHODS.items():
        trained = jax.jit(train, static_argnums=1)
        losses = {rate: round(float(trained(rate, make)), 4) for rate in (0.03, 0.1, 0.3, 1.0)}
        print(f"{name}: loss by learning rate {losses}")
