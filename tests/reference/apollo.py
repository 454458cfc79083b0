"""APOLLO, arXiv:2412.05270, Algorithm 1: the gradient, scaled as Adam scales it in a random subspace."""

import numpy as np

from . import short_side_first


def reference(grads, bases, *, per, scale, limit, learning_rate=1.0, b1=0.9, b2=0.999, eps=1e-8):
    updates = np.zeros(grads.shape)
    axis = 0 if per == "column" else None  # APOLLO or APOLLO-Mini
    M = V = previous = 0.0
    for t, (grad, P, update) in enumerate(
        zip(grads.astype(np.float64), bases, updates, strict=True)
    ):
        G, out = short_side_first(grad), short_side_first(update)
        (m, r), length = P.shape, lambda x: np.linalg.norm(x, axis=axis)
        R = P.T @ G  # "R_t <- P_t G_t", P_t orthonormal here
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + eps)

        held = np.maximum(length(R), np.sqrt(r / m) / 2 * length(G))  # our bound on the ratio
        S = G * (
            length(N) / (held + 1e-8)
        )  # "S <- diag(s), s_j = ||N_j|| / ||R_j||", the norms' ratio in Mini
        size = np.linalg.norm(S)
        if previous > 0 and size > limit * previous:  # the limiter of Fira
            S *= limit * previous / size
        previous = np.linalg.norm(S)
        out[:] = -learning_rate * scale * S
    return updates
