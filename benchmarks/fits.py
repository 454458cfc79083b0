"""How long a basis takes, and how good it is: every fit against the full SVD, in one thread and in two."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_lowrank as ol
from benchmarks.gradients import decaying
from benchmarks.processes import HINT, peers, threads, with_threads
from benchmarks.tables import Options, Table, bars
from benchmarks.timing import NOTE, clocked, milliseconds, ratio, take_turns

FITS = {
    "randomized_svd()": ol.randomized_svd(),
    "randomized_svd(power_iterations=2)": ol.randomized_svd(power_iterations=2),
    "subspace_iteration(), cold": ol.subspace_iteration(),
    "gaussian()": ol.gaussian(),
}


def fits(options: Options) -> Table:
    """Each fit on one matrix with singular values k^-0.7."""
    shapes, rank = (((32, 48),), 4) if options.quick else (((1024, 2736), (2048, 2048)), 128)
    cases = [
        with_threads(cores, _one_matrix, options, shape, rank)
        for cores in ([1] if options.quick else sorted({1, min(2, threads())}))
        for shape in shapes
    ]
    header = (
        "matrix",
        "threads",
        "fit",
        "ms",
        "faster than jnp.linalg.svd",
        "than torch.linalg.svd",
        "energy of the best basis",
        "‖PᵀP − I‖",
    )
    figure = bars(
        "faster than jnp.linalg.svd, times", {title: faster for title, _, faster in cases}, log=True
    )
    notes = (f"r = {rank}.", NOTE) if options.torch else (f"r = {rank}.", NOTE, HINT)
    return Table(header, [row for _, rows, _ in cases for row in rows], notes, figure)


def _one_matrix(options, shape, rank):
    """Title, rows, and how many times faster than `jnp.linalg.svd` by name; runs in a process of its own."""
    G, key = jnp.asarray(next(decaying([shape]))), jax.random.key(0)
    best = float(np.sum(np.arange(1, rank + 1) ** -1.4))
    empty = jnp.zeros((shape[0], rank))
    jitted = {name: jax.jit(fit) for name, fit in FITS.items()}
    full = jax.jit(lambda G: jnp.linalg.svd(G, full_matrices=False))
    calls = {"jnp.linalg.svd": clocked(lambda: full(G))}
    with peers(options.torch, [shape], rank, (), gradients="decaying") as process:
        if process:
            calls["torch.linalg.svd"] = process.call("svd", 0)
        for name, fit in jitted.items():
            calls[name] = clocked(lambda fit=fit: fit(key, G, empty))
        seconds = take_turns(calls, 5, budget=12)
    title, cores = f"{shape[0]}×{shape[1]}", str(threads())
    rows, faster = [], {}
    for name, values in seconds.items():
        by = lambda other, v=values: f"{ratio(seconds[other], v):.1f}×" if other in seconds else "–"
        cells = (milliseconds(values), by("jnp.linalg.svd"), by("torch.linalg.svd"))
        quality = ("–", "–")
        if name in jitted:
            P = jitted[name](key, G, empty)
            energy = float(jnp.sum(jnp.square(P.T @ G))) / best
            error = float(jnp.max(jnp.abs(P.T @ P - jnp.eye(rank))))
            quality = (f"{energy:.4f}", f"{error:.1e}")
        rows.append((title, cores, name, *cells, *quality))
        faster[name] = ratio(seconds["jnp.linalg.svd"], values)
    return f"{title}, threads: {cores}", rows, faster
