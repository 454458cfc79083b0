"""The gradients: NumPy only, so that the JAX and the PyTorch process make the same ones."""

from collections.abc import Iterable, Iterator

import numpy as np


def normal(shapes: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Standard normal matrices, (in, out) as Flax has them."""
    random = np.random.default_rng(0)
    for shape in shapes:
        yield random.standard_normal(shape, np.float32)


def decaying(shapes: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Random matrices with singular values k^-0.7."""
    for m, n in shapes:
        random = np.random.default_rng(0)
        side = min(m, n)
        U, V = (np.linalg.qr(random.standard_normal((size, side)))[0] for size in (m, n))
        yield ((U * np.arange(1, side + 1) ** -0.7) @ V.T).astype(np.float32)


KINDS = {"normal": normal, "decaying": decaying}
