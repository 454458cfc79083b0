"""Fits: close to the best basis, orthonormal, deterministic; each one works inside `low_rank`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import optax_lowrank as ol
from optax_lowrank import linalg
from optax_lowrank.fits import call_fit

from .test_linalg import EXAMPLES, STRUCTURES, structured, with_singular_values, x64

FITS = {
    "svd": ol.svd(),
    "randomized_svd": ol.randomized_svd(),
    "randomized_svd_bare": ol.randomized_svd(oversample=0, power_iterations=0),
    "subspace_iteration": ol.subspace_iteration(),
    "gaussian": ol.gaussian(),
}
FROM_GRADIENT = [name for name in FITS if name != "gaussian"]
KEY = jax.random.key(7)


@functools.lru_cache
def compiled(name):
    return jax.jit(FITS[name])


def fit(name, G, rank, key=KEY, old=None):
    old = np.zeros((G.shape[0], rank), G.dtype) if old is None else old
    return np.asarray(compiled(name)(key, G, old))


def slowly_decaying(m, n, seed=0):
    """σ_k ∝ k^-0.7, as gradients of transformers have; float32, largest entry 1.

    Singular vectors from Householder reflections, cheaply: a Gaussian sketch makes no difference between bases.
    """
    random, k = np.random.default_rng(seed), min(m, n)
    G = np.zeros((m, n))
    np.fill_diagonal(G, np.arange(1, k + 1) ** -0.7)
    for _ in range(3):
        for size in (m, n):
            u = random.standard_normal(size)
            G = (G - np.outer(2 * u / (u @ u), u @ G)).T
    return (G / np.abs(G).max()).astype(np.float32)


def energy(P, G):
    return np.square(P.T.astype(np.float64) @ G).sum()


def best_energy(G, rank):
    return np.square(np.linalg.svd(G, compute_uv=False)[:rank]).sum()


def assert_orthonormal(P):
    # the bound that the core promises for its bases
    np.testing.assert_allclose(P.T @ P, np.eye(P.shape[1]), rtol=0, atol=1e-5)


def signs_fixed(P):
    return (P[np.abs(P).argmax(axis=0), range(P.shape[1])] >= 0).all()


@pytest.mark.parametrize("shape", [(128, 342), (128, 128), (342, 128)], ids=str)
def test_randomized_svd_keeps_the_energy(shape):
    G = slowly_decaying(*shape)
    P = fit("randomized_svd", G, rank=16)
    assert_orthonormal(P)
    # one power iteration keeps about 0.993, none 0.93
    assert energy(P, G) >= 0.98 * best_energy(G, 16)


def test_randomized_svd_keeps_the_energy_of_a_large_matrix():
    """An MLP kernel of a Llama of 350M parameters at the default rank."""
    G = slowly_decaying(1024, 2736)
    P = fit("randomized_svd", G, rank=128)
    assert_orthonormal(P)
    share = np.arange(1, 1025) ** -1.4
    best = np.square(G).sum(dtype=np.float64) * share[:128].sum() / share.sum()
    assert energy(P, G) >= 0.98 * best


def test_more_power_iterations_keep_more():
    G = slowly_decaying(96, 160)
    fits = [jax.jit(ol.randomized_svd(power_iterations=q)) for q in range(3)]
    none, one, two = (energy(np.asarray(fit(KEY, G, np.zeros((96, 8)))), G) for fit in fits)
    assert none < one < two <= (1 + 1e-5) * best_energy(G, 8)  # float32 sums


def test_svd_keeps_the_most():
    G = slowly_decaying(24, 40)
    P = fit("svd", G, rank=5)
    assert energy(P, G) >= (1 - 1e-5) * best_energy(G, 5)  # float32 LAPACK
    U = np.linalg.svd(G.astype(np.float64))[0][:, :5]
    # an angle of 1e-3: float32 over the smallest gap of this spectrum
    np.testing.assert_allclose(np.abs(np.sum(P * U, axis=0)), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FITS)
def test_basis_is_orthonormal_with_signs_fixed(name):
    G = slowly_decaying(24, 40)
    P = fit(name, G, rank=6)
    assert P.shape == (24, 6)
    assert P.dtype == np.float32
    assert_orthonormal(P)
    assert signs_fixed(P)


@pytest.mark.parametrize("name", FITS)
def test_same_key_same_basis(name):
    G = slowly_decaying(24, 40)
    np.testing.assert_array_equal(fit(name, G, rank=6), fit(name, G, rank=6))


@pytest.mark.parametrize("name", ["randomized_svd_bare", "subspace_iteration", "gaussian"])
def test_another_key_another_basis(name):
    G = slowly_decaying(24, 40)
    other = fit(name, G, rank=6, key=jax.random.key(8))
    assert np.abs(fit(name, G, rank=6) - other).max() > 0.01


@pytest.mark.parametrize("name", ["svd", "randomized_svd"])
def test_sign_of_the_gradient_does_not_matter(name):
    G = slowly_decaying(24, 40)
    # not bit for bit: the first whitening may round another way
    np.testing.assert_allclose(fit(name, -G, rank=6), fit(name, G, rank=6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FROM_GRADIENT if name != "svd"])
@given(true_rank=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_directions_that_are_not_there_are_zero_columns_at_the_end(name, true_rank, seed):
    random = np.random.default_rng(seed)
    G = random.standard_normal((12, true_rank)) @ random.standard_normal((true_rank, 18))
    G = (G / max(np.abs(G).max(), 1e-30)).astype(np.float32)
    P = fit(name, G, rank=5)
    np.testing.assert_allclose(
        P.T @ P, np.diag(np.arange(5) < true_rank).astype(float), rtol=0, atol=1e-5
    )
    assert not P[:, true_rank:].any()
    # round-off of products of 18 terms, and of directions down to a hundredth of the largest
    np.testing.assert_allclose(P @ (P.T @ G), G, rtol=0, atol=1e-5)


# float64 with fewer shapes: each is a program of its own for each fit
CASES = [
    *((shape, np.float32) for shape in [(1, 1, 1), (24, 40, 9), (64, 64, 64), (4096, 64, 16)]),
    *((shape, np.float64) for shape in [(24, 40, 9), (512, 64, 16)]),
]


@settings(max_examples=EXAMPLES)
@given(
    case=st.sampled_from(CASES),
    kind=st.sampled_from(STRUCTURES),
    seed=st.integers(0, 2**32 - 1),
    scaled=st.booleans(),
)
def test_every_finite_gradient_has_a_basis(case, kind, seed, scaled):
    ((m, n, r), dtype), random = case, np.random.default_rng(seed)
    G = structured(kind, random, m, n)
    G = (G / max(np.abs(G).max(), 1e-300) if scaled else G).astype(dtype)
    old = np.zeros((m, r), dtype)
    with x64(dtype):
        for name in ("svd", "randomized_svd", "subspace_iteration", "subspace_iteration"):
            old = P = fit(name, G, r, old=old if name == "subspace_iteration" else None)
            kept = P.any(axis=0)
            assert P.dtype == dtype
            gram = P.T.astype(np.float64) @ P
            np.testing.assert_allclose(gram, np.diag(kept), rtol=0, atol=1e-4, err_msg=name)
            assert linalg.is_orthonormal(jnp.asarray(P))


@pytest.mark.parametrize("name", ["svd", "randomized_svd", "subspace_iteration"])
@pytest.mark.parametrize("kind", ["constant", "block", "binary rows", "rank one", "softmax"])
@pytest.mark.parametrize("shape", [(24, 40), (4096, 64)], ids=str)
def test_a_gradient_of_rank_one_has_one_direction(name, kind, shape):
    G = structured(kind, np.random.default_rng(3), *shape)
    G = (G / np.abs(G).max()).astype(np.float32)
    P = fit(name, G, rank=9 if shape == (24, 40) else 16)
    assert name == "svd" or P.any(axis=0).tolist() == [True] + [False] * (P.shape[1] - 1)
    # round-off of sums of 4096 terms
    assert energy(P[:, :1], G) >= (1 - 1e-5) * np.square(G, dtype=np.float64).sum()


def test_subspace_iteration_finds_a_gradient_that_has_left_the_basis():
    """Wholly, in one direction of a mixture of them, and a gradient that has no direction more to give."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.standard_normal((24, 24)))[0]
    for rows, more in (((4, 8), 4), ((2, 6), 4), ((6, 8), 2)):
        G = (U[:, slice(*rows)] @ random.standard_normal((rows[1] - rows[0], 40))).astype(
            np.float32
        )
        old = (U[:, :4] @ np.linalg.qr(random.standard_normal((4, 4)))[0]).astype(np.float32)
        P = fit("subspace_iteration", G, rank=4, old=old)
        assert P.any(axis=0).sum() == more
        assert energy(P, G) >= (1 - 1e-5) * np.square(G).sum()


@given(seed=st.integers(0, 2**32 - 1), ratio=st.floats(0.05, 0.8))
def test_subspace_iteration_converges_at_its_rate(seed, ratio):
    """tan of the angle to the leading subspace falls by (σ_{r+1} / σ_r)² a step."""
    random, (m, n, r) = np.random.default_rng(seed), (14, 20, 3)
    values = np.concatenate([[3.0, 2.0, 1.0], ratio * random.uniform(0.1, 1, m - r)])
    values[r] = ratio
    G = with_singular_values(random, m, n, values)
    U = np.linalg.svd(G)[0]

    def tangent(P):
        return np.linalg.norm(U[:, r:].T @ P @ np.linalg.inv(U[:, :r].T @ P), 2)

    P = np.linalg.qr(random.standard_normal((m, r)))[0]
    with x64(np.float64):
        for _ in range(4):
            before, P = tangent(P), fit("subspace_iteration", G, r, old=P)
            # 1 % and 1e-12: round-off in float64
            assert tangent(P) <= 1.01 * ratio**2 * before + 1e-12
            assert_orthonormal(P)


@pytest.mark.parametrize("name", [*FITS, "adaptive_rank"])
def test_a_fit_by_products_sees_no_entries(name):
    """What it makes of products alone is what it makes of the matrix."""
    chosen = FITS.get(name, ol.adaptive_rank(ol.randomized_svd(), 0.5, 1, 1))
    G = jnp.asarray(slowly_decaying(24, 40))
    products = dataclasses.replace(linalg.as_operator(G), dense=None)  # an error if it is called
    if not getattr(chosen, "by_products", False):
        assert name == "svd"
        products = linalg.as_operator(G)
    by = lambda G: jax.jit(lambda key: call_fit(chosen, key, G, jnp.zeros((24, 6))))(KEY)
    np.testing.assert_allclose(by(products), by(G), rtol=0, atol=1e-5)


def test_a_sum_with_a_product_of_two_is_an_operator():
    random = np.random.default_rng(0)
    G, X, Y = (
        jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((9, 14), (14, 2), (9, 2))
    )
    P = jnp.asarray(np.linalg.qr(random.standard_normal((9, 3)))[0], jnp.float32)
    C = jnp.asarray(random.standard_normal((3, 14)), jnp.float32)
    for A, B in ((linalg.as_operator(G).plus(P, C), G + P @ C), (linalg.as_operator(G).T, G.T)):
        right, left = (X, Y) if A.shape == (9, 14) else (Y, X)
        for got, want in (
            (A @ right, B @ right),
            (A.T @ left, B.T @ left),
            (A.energy(), jnp.sum(B**2)),
            (A.dense(), B),
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_sketch_as_wide_as_the_matrix_is_the_matrix():
    G = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    sketch = ol.randomized_svd(oversample=2, power_iterations=0)
    first, second = (sketch(jax.random.key(i), G, jnp.zeros((20, 4))) for i in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, ol.svd()(KEY, G, jnp.zeros((20, 4))), atol=1e-4)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", FITS)
def test_every_product_has_full_precision(name):
    """The default is TF32 on a GPU and bfloat16 on a TPU; the products of bfloat16 parts there are exact."""
    jaxpr = jax.make_jaxpr(ol.adaptive_rank(FITS[name]))(KEY, jnp.ones((12, 20)), jnp.ones((12, 4)))
    found = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert found
    highest = jax.lax.Precision.HIGHEST
    wide = [eqn for eqn in found if eqn.invars[0].aval.dtype != jnp.bfloat16]
    assert wide
    assert all(eqn.params["precision"] == (highest, highest) for eqn in wide)
    assert all(eqn.params["preferred_element_type"] == jnp.float32 for eqn in found)


MAKERS = [
    ol.svd,
    ol.randomized_svd,
    lambda: ol.randomized_svd(power_iterations=2),
    ol.subspace_iteration,
    ol.gaussian,
    lambda: ol.adaptive_rank(ol.svd()),
    lambda: ol.adaptive_rank(ol.svd(), min_rank=4),
]


def test_fits_of_equal_arguments_are_equal():
    """So that one that is made anew is no reason to compile anew."""
    first, second = ([make() for make in MAKERS] for _ in range(2))
    assert first == second
    assert len({*first, *second}) == len(MAKERS)


def test_subspace_iteration_tracks_a_moving_subspace():
    """A gradient that turns by 1.5 degrees a step: warm starts stay with it, the first basis does not."""
    random = np.random.default_rng(0)
    U, V = np.linalg.qr(random.standard_normal((20, 20)))[0], random.standard_normal((3, 30))
    noise = 0.05 * random.standard_normal((20, 30))
    first = P = None
    for step in range(60):
        angle = np.radians(1.5) * step
        turned = np.cos(angle) * U[:, :3] + np.sin(angle) * U[:, 3:6]
        G = (turned @ V + noise).astype(np.float32)
        P = fit("subspace_iteration", G, rank=3, key=jax.random.key(step), old=P)
        first = P if first is None else first
        assert_orthonormal(P)
    assert energy(P, G) >= 0.999 * best_energy(G, 3)
    assert energy(first, G) < 0.1 * best_energy(G, 3)


def test_subspace_iteration_fills_columns_that_were_zero():
    G = slowly_decaying(24, 40)
    old = np.zeros((24, 4), np.float32)
    old[:, :2] = fit("svd", G, rank=2)
    P = fit("subspace_iteration", G, rank=4, old=old)
    assert_orthonormal(P)
    assert energy(P, G) > energy(old, G)


@pytest.mark.parametrize("options", [{"oversample": -1}, {"power_iterations": -1}], ids=str)
def test_randomized_svd_says_what_is_wrong(options):
    with pytest.raises(ValueError, match=r"needs oversample >= 0 and power_iterations >= 0"):
        ol.randomized_svd(**options)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, jnp.float32) for name in FITS), ("randomized_svd", jnp.bfloat16)]
)
def test_fits_inside_low_rank(name, dtype):
    """Orthonormal float32 bases whatever the gradient's dtype; P PᵀG is what comes out."""
    tx = ol.low_rank(optax.identity(), rank=4, fit=FITS[name], refresh=ol.every(2))
    G = {"kernel": jnp.asarray(slowly_decaying(24, 12), dtype)}
    state, update = tx.init(G), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(G, state)
    P = np.asarray(state.leaves["kernel"].basis[0])
    assert (P.shape, P.dtype) == ((12, 4), np.float32)
    assert_orthonormal(P)
    assert updates["kernel"].dtype == dtype
    want = np.asarray(G["kernel"], np.float64)
    want = want @ P @ P.T
    # bfloat16 keeps 8 bits; float32 products of 24 terms
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-5
    got = np.asarray(updates["kernel"], np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
