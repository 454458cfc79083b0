"""Fira, arXiv:2410.01623, Algorithm 1: GaLore plus the residual, scaled as Adam scaled its column."""

import numpy as np

from . import left_singular_vectors, short_side_first


def reference(
    grads,
    *,
    rank,
    update_proj_gap,
    scale,
    limit,
    residual_scale,
    learning_rate=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    updates = np.zeros(grads.shape)
    M = V = previous = 0.0
    for t, (grad, update) in enumerate(zip(grads.astype(np.float64), updates, strict=True)):
        G, out = short_side_first(grad), short_side_first(update)
        if t % update_proj_gap == 0:
            P = left_singular_vectors(G, rank)
        R = P.T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)

        E = G - P @ R  # "(I - P P^T) G_t"; the authors' code leaves (1 - alpha) P R in it
        S = E * (np.linalg.norm(N, axis=0) / (np.linalg.norm(R, axis=0) + 1e-8))  # phi, by column
        size = np.linalg.norm(S)
        if previous > 0 and size > limit * previous:  # the limiter; the first step has no previous
            S *= limit * previous / size
        previous = np.linalg.norm(S)  # after limiting, and kept through a refresh

        # The paper's text is residual_scale = scale; its tables were made with 1.
        out[:] = -learning_rate * (scale * P @ N + residual_scale * S)
    return updates
