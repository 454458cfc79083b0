"""How long a basis takes, and how good it is: every fit against the full SVD, and a whole step with a refresh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowrank as ol
from benchmarks.timing import markdown, milliseconds, ratio, take_turns

RANK = 128
SHAPES = ((1024, 2736), (2048, 2048))


def gradient(m: int, n: int) -> tuple[jax.Array, float]:
    """A matrix with singular values k^-0.7, and the energy that its best basis of `RANK` columns holds."""
    random = np.random.default_rng(0)
    side = min(m, n)
    U, V = (np.linalg.qr(random.standard_normal((size, side)))[0] for size in (m, n))
    s = np.arange(1, side + 1) ** -0.7
    G = ((U * s) @ V.T).astype(np.float32)
    return jnp.asarray(G), float(np.sum(s[:RANK] ** 2))


def fits() -> str:
    """Each fit on one matrix."""
    rows = []
    for m, n in SHAPES:
        G, best = gradient(m, n)
        empty, key = jnp.zeros((m, RANK)), jax.random.key(0)
        chosen = {
            "svd()": ol.svd(),
            "randomized_svd()": ol.randomized_svd(),
            "randomized_svd(power_iterations=2)": ol.randomized_svd(power_iterations=2),
            "subspace_iteration(), cold": ol.subspace_iteration(),
            "gaussian()": ol.gaussian(),
        }
        jitted = {name: jax.jit(fit) for name, fit in chosen.items()}
        full = jax.jit(lambda G: jnp.linalg.svd(G, full_matrices=False))
        calls = {
            name: lambda fit=fit, G=G, e=empty, k=key: fit(k, G, e) for name, fit in jitted.items()
        }
        seconds = take_turns({"jnp.linalg.svd": lambda full=full, G=G: full(G), **calls}, repeats=5)
        for name, fit in jitted.items():
            P = fit(key, G, empty)
            energy = float(jnp.sum(jnp.square(P.T @ G))) / best
            error = float(jnp.max(jnp.abs(P.T @ P - jnp.eye(RANK))))
            speed = ratio(seconds["jnp.linalg.svd"], seconds[name])
            cells = (f"{m}×{n}", name, milliseconds(seconds[name]), f"{speed:.1f}×")
            rows.append((*cells, f"{energy:.4f}", f"{error:.1e}"))
    header = (
        "matrix",
        "fit",
        "ms",
        "faster than the full SVD",
        "energy of the best basis",
        "‖PᵀP − I‖",
    )
    return markdown(header, rows)


def refresh_steps() -> str:
    """A whole optimizer step with a refresh, on one matrix, against the same step with the exact fit."""
    rows = []
    for m, n in SHAPES:
        grads = {"kernel": gradient(m, n)[0]}
        calls = {}
        for name, tx in {
            "galore(fit=svd())": ol.galore(1e-3, rank=RANK, update_proj_gap=1, fit=ol.svd()),
            "optax.contrib.galore": optax.contrib.galore(1e-3, rank=RANK, update_proj_gap=1),
            "galore()": ol.galore(1e-3, rank=RANK, update_proj_gap=1),
            "galore(), no refresh": ol.galore(1e-3, rank=RANK, update_proj_gap=10**6),
        }.items():
            update = jax.jit(tx.update)
            _, state = update(grads, tx.init(grads), grads)  # "no refresh": its first step has one
            calls[name] = lambda update=update, state=state, grads=grads: update(
                grads, state, grads
            )
        seconds = take_turns(calls, repeats=5)
        for name, values in seconds.items():
            speed = ratio(seconds["galore(fit=svd())"], values)
            rows.append((f"{m}×{n}", name, milliseconds(values), f"{speed:.1f}×"))
    return markdown(("matrix", "step with a refresh", "ms", "faster than with svd()"), rows)
