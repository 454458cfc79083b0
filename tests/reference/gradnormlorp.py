"""GradNormLoRP, arXiv:2412.19616: weight-normalised weights, both sides of the gradient projected."""

import numpy as np

from . import left_singular_vectors


def reference(
    grads, *, params, rank, update_proj_gap, scale, learning_rate, b1=0.9, b2=0.999, eps=1e-8
):
    updates, W = np.zeros(grads.shape), params.astype(np.float64)
    M = V = M_mag = V_mag = 0.0
    for t, (D, update) in enumerate(zip(grads.astype(np.float64), updates, strict=True)):
        magnitude = np.linalg.norm(W, axis=0)  # "w = delta v / ||v||", one per output unit
        unit = W / magnitude
        D_mag = np.sum(D * unit, axis=0)  # dL/d delta
        D_dir = D - unit * D_mag  # dL/dv at v = W: what turns the column
        refresh = t % update_proj_gap == 0
        if refresh:
            left, right = left_singular_vectors(D_dir, rank), left_singular_vectors(D_dir.T, rank)
        R = left.T @ D_dir @ right  # "U^T D_t V"
        if refresh:  # R is diagonal up to round-off, which Adam would blow up to 1
            R = np.where(np.abs(R) <= 1e-5 * np.abs(R).max(), 0.0, R)
        M, M_mag = b1 * M + (1 - b1) * R, b1 * M_mag + (1 - b1) * D_mag
        V, V_mag = b2 * V + (1 - b2) * R**2, b2 * V_mag + (1 - b2) * D_mag**2
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        N, N_mag = (M / c1) / (np.sqrt(V / c2) + eps), (M_mag / c1) / (np.sqrt(V_mag / c2) + eps)
        turned = W - learning_rate * scale * left @ N @ right.T
        resized = magnitude - learning_rate * N_mag  # `scale` is for the direction only
        update[:] = resized * turned / np.linalg.norm(turned, axis=0) - W
        W = W + update
    return updates
