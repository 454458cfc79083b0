"""Each method's algorithm box, transcribed literally into float64 NumPy: what the library must give.

`reference(grads, ...)` takes the (steps, m, n) gradients of one kernel in Flax layout (inputs first)
and returns what the optimizer adds to it at each step. Letters are those of `optax_lowrank.low_rank`.
This file holds what the papers leave open: which side is projected, and singular vectors' signs.
"""

import numpy as np


def short_side_first(G):
    """A tall matrix is transposed, so that the projected side comes first; a square one stays."""
    return G if G.shape[0] <= G.shape[1] else G.T


def left_singular_vectors(G, rank):
    """The first `rank` columns of U, the entry of largest magnitude in each made positive."""
    U = np.linalg.svd(G, full_matrices=False)[0][:, :rank]
    return U * np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
