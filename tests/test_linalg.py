"""One-matrix maths: bases are orthonormal whatever they are made of, and agree with LAPACK in float64."""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from optax_lowrank import linalg

# A list rather than ranges: every shape is compiled once.
SHAPES = [(1, 1), (7, 1), (5, 5), (12, 4), (40, 17)]
DTYPES = [np.float32, np.float64]
EPS = {dtype: np.finfo(dtype).eps for dtype in DTYPES}

orthonormalize, left_singular_vectors, push_through_weights = map(
    jax.jit,
    (
        linalg.orthonormalize,
        linalg.left_singular_vectors,
        linalg.push_through_weights,
    ),
)
seeds, shapes, dtypes = st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.sampled_from(DTYPES)


def x64(dtype):
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def call(function, *arrays):
    """`function` in the dtype of its first argument; the result as float64."""
    with x64(arrays[0].dtype), jax.numpy_dtype_promotion("strict"):
        result = function(*map(jnp.asarray, arrays))
        assert result.dtype == arrays[0].dtype
        return np.asarray(result, np.float64)


def orthonormal(random, m, r):
    return np.linalg.qr(random.standard_normal((m, r)))[0]


def with_singular_values(random, m, n, values):
    values = np.asarray(values)
    return (orthonormal(random, m, len(values)) * values) @ orthonormal(random, n, len(values)).T


def assert_orthonormal_or_zero(Q, rank):
    """QᵀQ is diagonal with `rank` ones and zeros elsewhere."""
    gram = Q.T @ Q
    kept = np.diag(gram) > 0.5
    assert kept.sum() == rank
    # the bound that the core promises for its bases
    np.testing.assert_allclose(gram, np.diag(kept), rtol=0, atol=1e-5)
    assert not Q[:, ~kept].any()


def structured(kind, random, m, n):
    """A float64 matrix as gradients can be, where rounding errors do not average out."""
    binary = random.choice([0.0, 1.0], (m, 1))
    normal = random.standard_normal((m, n))
    match kind:
        case "constant":
            return np.full((m, n), random.uniform(-1, 1))
        case "nearly constant":
            return np.ones((m, n)) + 10.0 ** random.uniform(-8, -2) * normal
        case "sign":
            return np.sign(normal)
        case "block":
            G = np.zeros((m, n))
            G[: random.integers(m) + 1, : random.integers(n) + 1] = 1
            return G
        case "binary rows":
            return binary * normal[:1]
        case "rank one":
            return normal[:, :1] * normal[:1]
        case "low rank":
            k = random.integers(min(m, n)) + 1
            return normal[:, :k] @ random.standard_normal((k, n))
        case "graded":
            k = min(m, n)
            falling = 10.0 ** -random.uniform(0, 12 * np.linspace(0, 1, k))
            return with_singular_values(random, m, n, falling)
        case "toeplitz":
            diagonals = random.standard_normal(m + n).cumsum()
            return diagonals[np.subtract.outer(np.arange(m), np.arange(n)) + n]
        case "geometric":
            return random.uniform(0.5, 1) ** np.abs(np.subtract.outer(np.arange(m), np.arange(n)))
        case "equal columns":
            return normal[:, random.integers(n, size=n)]
        case "equal rows":
            return normal[random.integers(m, size=m)]
        case "mixed columns":
            return normal * 10.0 ** random.uniform(-30, 30, (1, n))
        case "mixed rows":
            return normal * 10.0 ** random.uniform(-30, 30, (m, 1))
        case "mixed entries":
            return normal * 10.0 ** random.uniform(-30, 30, (m, n))
        case "two scales":
            return (
                normal * np.where(np.arange(m) < m // 2, 1, 10.0 ** -random.uniform(1, 8))[:, None]
            )
        case (
            "softmax"
        ):  # a zero-initialized layer of n classes, binary features, examples of one class
            features = random.choice([0.0, 1.0], (m, 8))
            return features @ np.tile(1 / n - (np.arange(n) == random.integers(n)), (8, 1)) / 8
        case "zero":
            return np.zeros((m, n))


STRUCTURES = [
    *("constant", "nearly constant", "sign", "block", "binary rows", "rank one", "low rank"),
    *("graded", "toeplitz", "geometric", "equal columns", "equal rows", "mixed columns"),
    *("mixed rows", "mixed entries", "two scales", "softmax", "zero"),
]
# `EXAMPLES=20000 pytest tests/test_linalg.py tests/test_fits.py` looks harder
EXAMPLES = int(os.environ.get("EXAMPLES", "200"))


# Signs


@given(shape=shapes, seed=seeds)
def test_fix_signs_makes_the_largest_entry_positive(shape, seed):
    P = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    fixed = call(linalg.fix_signs, P)
    largest = np.abs(P).argmax(axis=0)
    assert (fixed[largest, range(shape[1])] > 0).all()
    np.testing.assert_array_equal(np.abs(fixed), np.abs(P))
    flips = np.where(np.arange(shape[1]) % 2, -1, 1).astype(np.float32)
    np.testing.assert_array_equal(call(linalg.fix_signs, P * flips), fixed)


def test_fix_signs_takes_the_first_of_equals_and_keeps_zeros():
    P = np.array([[-2.0, 1.0, 0.0], [2.0, -1.0, 0.0]], np.float32)
    assert call(linalg.fix_signs, P).tolist() == [[2, 1, 0], [-2, -1, 0]]


# Orthonormal bases


@given(
    shape=shapes, dtype=dtypes, seed=seeds, decades=st.floats(0, 5), exponent=st.integers(-12, 12)
)
def test_orthonormalize_keeps_graded_columns_at_any_scale(shape, dtype, seed, decades, exponent):
    """Singular values falling over up to five decades, the whole matrix scaled by 1e-12 to 1e12."""
    random, (m, r) = np.random.default_rng(seed), shape
    values = 10.0 ** (exponent - decades * np.linspace(0, 1, r))
    Y = with_singular_values(random, m, r, values).astype(dtype)
    Q = call(orthonormalize, Y)
    assert_orthonormal_or_zero(Q, rank=r)
    Y = Y.astype(np.float64)
    # nothing of Y is left outside: round-off of sums of m terms and of r × r solves
    assert np.linalg.norm(Y - Q @ (Q.T @ Y), 2) <= 50 * EPS[dtype] * np.linalg.norm(Y, 2)


@given(shape=shapes, dtype=dtypes, seed=seeds, data=st.data())
def test_orthonormalize_gives_zero_columns_for_lost_rank(shape, dtype, seed, data):
    random, (m, r) = np.random.default_rng(seed), shape
    rank = data.draw(st.integers(0, r), label="rank")
    Y = with_singular_values(random, m, r, random.uniform(0.1, 1, rank)).astype(dtype)
    Q = call(orthonormalize, Y)
    assert_orthonormal_or_zero(Q, rank)
    Y = Y.astype(np.float64)
    # what is dropped is shorter than 1e-6 of the norm
    assert np.linalg.norm(Y - Q @ (Q.T @ Y), 2) <= 1e-6 * np.linalg.norm(Y, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormalize_of_equal_and_zero_columns(shape, dtype):
    assert not call(orthonormalize, np.zeros(shape, dtype)).any()
    assert_orthonormal_or_zero(call(orthonormalize, np.ones(shape, dtype)), rank=1)
    one_left = np.eye(*shape, dtype=dtype) * (np.arange(shape[1]) == 0)
    assert_orthonormal_or_zero(call(orthonormalize, one_left.astype(dtype)), rank=1)


@settings(max_examples=EXAMPLES)
@given(shape=shapes, dtype=dtypes, seed=seeds, kind=st.sampled_from(STRUCTURES))
def test_orthonormalize_of_structured_matrices(shape, dtype, seed, kind):
    Y = structured(kind, np.random.default_rng(seed), *shape).astype(dtype)
    Q = call(orthonormalize, Y)
    kept = Q.any(axis=0)
    assert_orthonormal_or_zero(Q, kept.sum())
    # what is lost of a column is round-off of its own length, be it 1e-30 or 1e30
    Y = Y.astype(np.float64) / np.maximum(np.abs(Y).max(axis=0), np.finfo(dtype).tiny)
    length = np.linalg.norm(Y, axis=0)
    lost = np.linalg.norm(Y - Q @ (Q.T @ Y), axis=0)
    assert (lost <= 100 * EPS[dtype] * np.sqrt(shape[1]) * length).all()


@pytest.mark.parametrize("shape", [(512, 256), (65_536, 8)], ids=str)
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("constant", 1), ("block", 1), ("binary rows", 1), ("sign", None), ("equal columns", None)],
)
def test_orthonormalize_of_many_rows(shape, kind, rank):
    """The round-off of a Gram matrix of m rows that are alike grows with m."""
    Y = structured(kind, np.random.default_rng(1), *shape).astype(np.float32)
    rank = rank or len(np.unique(Y, axis=1).T)
    assert_orthonormal_or_zero(call(orthonormalize, Y), rank)


def test_round_off_is_measured_by_each_column_or_by_the_longest():
    Y = np.diag([1.0, 1e-20, 0.0, 1e30]).astype(np.float32)[:, :3]
    assert call(linalg.orthonormalize, Y).any(axis=0).tolist() == [True, True, False]
    of_longest = functools.partial(linalg.orthonormalize, of_longest=True)
    assert call(of_longest, Y).any(axis=0).tolist() == [True, False, False]


def test_is_orthonormal():
    Q = orthonormal(np.random.default_rng(0), 12, 4).astype(np.float32)
    zero = np.where(np.arange(4) < 3, Q, 0)
    bad = [np.nan * Q, np.where(zero == 0, np.inf, Q), 1.01 * Q, Q[:, [0, 1, 2, 2]], zero + 1e-2]
    assert all(linalg.is_orthonormal(jnp.asarray(P)) for P in (Q, zero, 0 * Q, (1 + 1e-4) * Q))
    assert not any(linalg.is_orthonormal(jnp.asarray(P)) for P in bad)
    assert linalg.is_orthonormal(jnp.asarray(1.01 * Q), tol=0.1)


def test_orthonormalize_needs_no_eigendecomposition():
    """One takes minutes to compile on a TPU."""
    found = str(jax.make_jaxpr(linalg.orthonormalize)(jnp.ones((6, 3))))
    assert "cholesky" in found
    assert not any(name in found for name in ("eigh", "qr[", "svd["))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_eigendecomposition_of_each_platform(platform):
    export = jax.export.export(jax.jit(linalg.left_singular_vectors), platforms=[platform])
    module = export(jax.ShapeDtypeStruct((12, 4), jnp.float32)).mlir_module()
    assert ("Eigh" in module) == (platform == "tpu")  # Jacobi; the default there is "Qdwh", in HLO


@given(shape=shapes, dtype=dtypes, seed=seeds, data=st.data())
def test_left_singular_vectors_are_those_of_lapack(shape, dtype, seed, data):
    """Singular values 1, 1/2, 1/4, … down to 1/64 repeatedly apart, then exact zeros."""
    random, (m, r) = np.random.default_rng(seed), shape
    rank = data.draw(st.integers(0, min(r, 7)), label="rank")
    Y = with_singular_values(random, m, r, 0.5 ** np.arange(rank)).astype(dtype)
    U = call(left_singular_vectors, Y)
    assert_orthonormal_or_zero(U, rank)
    assert not U[:, rank:].any()  # zero columns last

    want = np.linalg.svd(Y.astype(np.float64), full_matrices=False)[0][:, :rank]
    aligned = np.abs(np.sum(U[:, :rank] * want, axis=0))
    # an eigenvector of the r × r Gram matrix turns by round-off over the gap of squares, 3/4 · 4^-6
    # at the smallest: sin² of that angle is missing from the cosine
    np.testing.assert_allclose(aligned, 1, rtol=0, atol=1e5 * EPS[dtype])
    largest = np.abs(U[:, :rank]).argmax(axis=0)
    assert (U[largest, range(rank)] > 0).all()


# The damped solve


def damped_solve(H, e, damping):
    """(λI + H Hᵀ)⁻¹ H e through the weights of the columns of H."""
    return H.astype(np.float64) @ call(push_through_weights, H.T @ H, e, damping)


@given(seed=seeds, dtype=dtypes, decades=st.floats(-3, 2), size=st.floats(-3, 3))
def test_push_through_weights_give_the_dense_inverse(seed, dtype, decades, size):
    """λ over five decades of the mean squared column."""
    random, (d, s) = np.random.default_rng(seed), (12, 3)
    H = (10**size * random.standard_normal((d, s))).astype(dtype)
    e = random.standard_normal(s).astype(dtype)
    damping = np.asarray(10**decades * np.mean(np.sum(np.square(H), axis=0)), dtype)
    got = damped_solve(H, e, damping)
    H, e = H.astype(np.float64), e.astype(np.float64)
    dense = damping * np.eye(d) + H @ H.T
    want = np.linalg.solve(dense, H @ e)
    condition = np.linalg.cond(H.T @ H + damping * np.eye(s)) * np.linalg.cond(H)
    # round-off of ours, and of the float64 reference
    tolerance = 20 * (EPS[dtype] * condition + EPS[np.float64] * np.linalg.cond(dense))
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_push_through_weights_keep_digits_where_woodbury_loses_them():
    """Two equal columns and a small λ: x = g / (λ + 2 ‖g‖²), where the printed form subtracts equals."""
    g = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    damping = np.asarray(1e-4 * g @ g, np.float32)
    H, e = np.stack([g, g], axis=1), np.array([0, 1], np.float32)
    want = g.astype(np.float64) / (damping + 2 * float(g.astype(np.float64) @ g))

    def error(x):
        return np.linalg.norm(x - want) / np.linalg.norm(want)

    condition = 2e4  # of λI + HᵀH
    assert error(damped_solve(H, e, damping)) < condition * EPS[np.float32]
    inverse = np.linalg.inv(damping * np.eye(2, dtype=np.float32) + H.T @ H)
    assert error(g / damping - H @ (inverse @ (H.T @ g)) / damping) > condition * EPS[np.float32]


def test_push_through_weights_of_a_batch():
    random = np.random.default_rng(0)
    H = random.standard_normal((2, 6, 3)).astype(np.float32)
    e, damping = np.ones((2, 3), np.float32), np.array([0.5, 2.0], np.float32)
    got = call(push_through_weights, H.mT @ H, e, damping)
    want = [
        call(push_through_weights, h.T @ h, *rest) for h, *rest in zip(H, e, damping, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "m", "n"), [((), 20, 10), ((3,), 10, 20), ((), 300, 140), ((3,), 140, 300)]
)
def test_products_of_parts_have_the_digits_of_float32(batch, m, n):
    """What TPUs are given, in blocks that overlap; entries from 1e-8 to 1e8, so that a lost part would show."""
    random = np.random.default_rng(0)
    A, B = (
        random.standard_normal((*batch, *shape)) * 10.0 ** random.uniform(-8, 8, shape[1:])
        for shape in ((m, 30), (30, n))
    )
    A, B = A.astype(np.float32), B.astype(np.float32)
    got = jax.jit(linalg._in_parts)(A, B)
    assert got.dtype == jnp.float32
    A, B = A.astype(np.float64), B.astype(np.float64)
    assert np.all(np.abs(got - A @ B) <= 1e-6 * (np.abs(A) @ np.abs(B)))


@pytest.mark.parametrize(("shape", "k"), [((20, 300), 10), ((128, 256), 140)])
@pytest.mark.parametrize("axis", [0, 1])
def test_products_with_a_bfloat16_matrix_have_the_digits_of_float32(shape, k, axis):
    """What TPUs are given; entries from 1e-8 to 1e8, so that a lost part would show."""
    random = np.random.default_rng(0)
    G, X = (
        random.standard_normal(size) * 10.0 ** random.uniform(-8, 8, size)
        for size in (shape, (shape[axis], k))
    )
    G, X = jnp.asarray(G, jnp.bfloat16), X.astype(np.float32)
    got = jax.jit(linalg._times_parts, static_argnums=2)(G, X, axis)
    assert got.dtype == jnp.float32
    G, X = np.asarray(G, np.float64), X.astype(np.float64)
    G = G if axis else G.T
    assert np.all(np.abs(got - G @ X) <= 1e-6 * (np.abs(G) @ np.abs(X)))
