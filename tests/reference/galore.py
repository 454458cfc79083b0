"""GaLore, arXiv:2403.03507, Algorithm 2 (Adam), with weight decay 0."""

import numpy as np

from . import left_singular_vectors, short_side_first


def reference(
    grads, *, rank, update_proj_gap, scale, learning_rate=1.0, b1=0.9, b2=0.999, eps=1e-8
):
    updates = np.zeros(grads.shape)
    M = V = 0.0
    for t, (grad, update) in enumerate(zip(grads.astype(np.float64), updates, strict=True)):
        G, out = short_side_first(grad), short_side_first(update)
        if t % update_proj_gap == 0:  # "U, S, V <- SVD(G_t), P_t <- U[:, :r]"
            P = left_singular_vectors(G, rank)
        R = P.T @ G  # "R_t <- P_t^T G_t"
        M = b1 * M + (1 - b1) * R  # the moments stay as they are when P changes
        V = b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)
        out[:] = -learning_rate * scale * P @ N  # "W_t <- W_{t-1} - eta alpha P N_t"
    return updates
