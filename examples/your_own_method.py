"""A method of your own is a `Rule` of one matrix. This one: momentum inside the basis, the gradient itself outside.

U = P M + (G - P R),  M <- 0.9 M + R          in the core's terms, U = P A + G diag(c):  A = M - R,  c = 1
"""

import jax
import jax.numpy as jnp
import optax

import optax_lowrank as ol


def step(
    R, columns, M
):  # coordinates (r, n), squared lengths of the gradient's columns (n,), state
    M = 0.9 * M + R
    return M - R, jnp.ones(R.shape[1]), M


mine = ol.Rule(init=jnp.zeros_like, turn=lambda M, turn: turn(M), step=step)
METHODS = {
    "mine": lambda rate: ol.assemble(ol.low_rank(mine, rank=8), rate, rank=8),
    "galore": lambda rate: ol.galore(rate, rank=8),
}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def final_loss(tx: optax.GradientTransformation, steps: int = 200) -> float:
    """A student of two layers learns what a teacher of the same shape answers."""
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5
    net = lambda seed: {"up": normal(seed, 64, 96), "down": normal(seed + 1, 96, 64)}
    answer = lambda net, x: jnp.tanh(x @ net["up"]) @ net["down"]
    x, student = 8 * normal(0, 256, 64), net(3)
    loss = lambda net_, y=answer(net(1), x): jnp.mean((answer(net_, x) - y) ** 2)

    def train(carry, _):
        updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(train, carry, length=steps)[0])
    return float(loss(run((student, tx.init(student)))[0]))


if __name__ == "__main__":
    for name, make in METHODS.items():
        print(name, {rate: round(final_loss(make(rate)), 4) for rate in RATES})
