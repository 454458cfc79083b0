"""AdaRankGrad, arXiv:2410.17881: rank by captured energy, moments carried into the new basis.

The paper's linear rule for the second moment gives negative entries. LDAdam's rule (arXiv:2410.16103)
stands in for it, with a mass w per row: how much of its history the direction really has.
"""

import numpy as np

from . import left_singular_vectors, short_side_first


def reference(
    grads,
    *,
    rank,
    update_proj_gap,
    scale,
    max_residual_energy,
    min_rank,
    rank_step,
    learning_rate=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    """Returns the updates and the rank in use at each step."""
    updates, ranks = np.zeros(grads.shape), []
    P = M = V = w = None
    for t, (grad, update) in enumerate(zip(grads.astype(np.float64), updates, strict=True)):
        G, out = short_side_first(grad), short_side_first(update)
        if t % update_proj_gap == 0:
            energy = np.linalg.svd(G, compute_uv=False) ** 2
            lost = 1 - np.cumsum(energy) / energy.sum()  # ||G - P P^T G||^2 / ||G||^2 at rank k + 1
            grid = range(min(min_rank, rank), rank + 1, rank_step)
            r = next((r for r in grid if lost[r - 1] <= max_residual_energy), rank)
            P, P_old = left_singular_vectors(G, r), P
            if t == 0:
                M, V, w = np.zeros((r, G.shape[1])), np.zeros((r, G.shape[1])), np.zeros((r, 1))
            else:
                M, V, w = carry(P.T @ P_old, M, V, w, 1 - b1**t)
        R = P.T @ G
        M = b1 * M + (1 - b1) * R
        V = b2 * V + (1 - b2) * R**2
        w = b2 * w + (1 - b2)
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / w) + eps)  # the mass corrects V only
        out[:] = -learning_rate * scale * P @ N
        ranks.append(r)
    return updates, np.array(ranks)


def carry(Q, M, V, w, correction):
    """The moments and masses of the old directions in the new ones; Q is (r_new, r_old)."""
    mean, square = M / correction, V / w
    kept = np.sum(Q**2, axis=1, keepdims=True)  # share of a new direction within the old span
    known = kept >= 1e-6  # the others start anew
    mass = np.where(known, Q**2 @ w, 0.0)
    square = np.abs(Q**2 @ (square - mean**2) + (Q @ mean) ** 2)  # LDAdam: variance + mean^2
    return Q @ M, mass / np.where(known, kept, 1.0) * square, mass
