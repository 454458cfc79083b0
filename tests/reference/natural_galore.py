"""Natural GaLore, arXiv:2410.16029: GaLore with R_t preconditioned by the recent empirical Fisher."""

import numpy as np

from . import left_singular_vectors, short_side_first


def reference(
    grads,
    *,
    rank,
    update_proj_gap,
    scale,
    history,
    damping,
    learning_rate=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    updates = np.zeros(grads.shape)
    P, past, M, V = None, [], 0.0, 0.0
    for t, (grad, update) in enumerate(zip(grads.astype(np.float64), updates, strict=True)):
        G, out = short_side_first(grad), short_side_first(update)
        if t % update_proj_gap == 0:
            P, P_old = left_singular_vectors(G, rank), P
            past = [P.T @ P_old @ old for old in past]  # the same directions in new coordinates
        R = P.T @ G
        past = [*past, R][-history:]  # `history` gradients, g_k among them
        H = np.stack([g.ravel() for g in past], axis=1)  # "G_h = [g_k, g_{k-1}, ...]"
        F = damping * np.eye(R.size) + H @ H.T  # "F = lambda I + G_h G_h^T": a sum, not a mean
        natural = np.linalg.solve(F, R.ravel()).reshape(R.shape)  # "F^-1 g_k", no Woodbury needed
        M = b1 * M + (1 - b1) * natural
        V = b2 * V + (1 - b2) * natural**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)
        out[:] = -learning_rate * scale * P @ N
    return updates
