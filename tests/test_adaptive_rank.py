"""AdaRankGrad: ranks that follow the gradient. Where the theorem holds, where it does not, what it costs."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowrank as ol

from .helpers import factorizations, run

GOLDEN = pathlib.Path(__file__).parent / "golden"


def ranks_of(fit, G, cap=None):
    """How many columns a fit of `G` keeps."""
    P = fit(
        jax.random.key(0), jnp.asarray(G), jnp.zeros((G.shape[0], cap or min(G.shape)), G.dtype)
    )
    return int(jnp.any(P != 0, axis=0).sum())


def spectrum(sigma, shape=(24, 32), seed=0):
    """A matrix with these singular values."""
    random = np.random.default_rng(seed)
    U, V = (np.linalg.qr(random.standard_normal((size, len(sigma))))[0] for size in shape)
    return (U * np.asarray(sigma)) @ V.T


def lost(G):
    """Share of the energy that is left out at rank 0, 1, 2, …"""
    energy = np.linalg.svd(np.asarray(G, np.float64), compute_uv=False) ** 2
    return 1 - np.concatenate([[0], np.cumsum(energy)]) / energy.sum()


def exact(max_residual_energy, min_rank=1, rank_step=1):
    return ol.adaptive_rank(ol.svd(), max_residual_energy, min_rank, rank_step)


# The trace


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_golden_trace(shape):
    trace = np.load(GOLDEN / f"adarank_{shape}.npz")
    config = {"learning_rate": 1.0, **json.loads(str(trace["config"]))}
    tx = ol.adarankgrad(fit=ol.svd(), **config)
    params = {"kernel": jnp.zeros(trace["grads"].shape[1:])}
    state, update, ranks = tx.init(params), jax.jit(tx.update), []
    for grad, want in zip(trace["grads"], trace["updates"], strict=True):
        updates, state = update({"kernel": jnp.asarray(grad)}, state, params)
        ranks += ol.diagnostics(state)["kernel"].rank.tolist()
        # a literal float32 transcription is within 4e-4
        np.testing.assert_allclose(updates["kernel"], want, rtol=0, atol=2e-3 * np.abs(want).max())
    np.testing.assert_array_equal(ranks, trace["ranks"])
    assert len(set(ranks)) > 1


# The rule


def test_energy_of_the_coordinates_is_what_a_direct_residual_says():
    """1 − Σ σ_k² / ‖G‖² = ‖G − P PᵀG‖² / ‖G‖² at every rank, which one fit answers for all."""
    G = np.random.default_rng(0).standard_normal((24, 32))
    with jax.enable_x64(True):
        P = np.asarray(ol.svd()(jax.random.key(0), jnp.asarray(G), jnp.zeros((24, 24))))
    kept = np.cumsum(np.sum(np.square(P.T @ G), axis=1)) / np.sum(G**2)
    direct = [np.sum((G - P[:, :r] @ (P[:, :r].T @ G)) ** 2) / np.sum(G**2) for r in range(1, 25)]
    np.testing.assert_allclose(1 - kept, direct, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("true_rank", "want"), [(1, 4), (4, 4), (5, 8), (11, 12), (15, 14)])
def test_exact_rank_is_rounded_up_to_the_grid_or_the_cap(true_rank, want):
    G = spectrum(np.ones(true_rank)).astype(np.float32)
    assert ranks_of(exact(1e-4, min_rank=4, rank_step=4), G, cap=14) == want


@pytest.mark.parametrize("energy", [0.0, 0.02, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("step", [1, 3])
def test_rank_is_the_first_of_the_grid_within_the_bound(energy, step):
    G = spectrum(0.8 ** np.arange(24)).astype(np.float32)
    rank, e = ranks_of(exact(energy, min_rank=2, rank_step=step), G), lost(G)
    assert e[rank] <= energy + 1e-6 or rank == 24
    assert rank == 2 or e[rank - step] > energy


def test_more_may_be_lost_with_less_rank():
    G = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    ranks = [ranks_of(exact(energy), G) for energy in np.linspace(0, 1, 21)]
    assert ranks == sorted(ranks, reverse=True)
    assert (ranks[0], ranks[-1]) == (24, 1)


def test_min_rank_above_the_cap_is_the_cap():
    G = spectrum([1.0]).astype(np.float32)
    assert ranks_of(exact(0.3, min_rank=100), G, cap=6) == 6


def test_rank_does_not_depend_on_the_scale_of_the_gradient():
    G = spectrum(0.8 ** np.arange(24))
    assert {ranks_of(exact(0.1), (G * s).astype(np.float32)) for s in (1e-30, 1, 1e30)} == {6}
    assert ranks_of(exact(0.1), np.zeros((6, 8), np.float32), cap=3) == 3  # of the exact fit


def test_arguments_may_be_traced():
    """A fit of arrays has no value to compare; it is a static argument all the same, equal to itself alone."""
    G, P = jnp.asarray(spectrum(0.8 ** np.arange(24)), jnp.float32), jnp.zeros((24, 24))
    refit = jax.jit(lambda fit, G, P: fit(jax.random.key(0), G, P), static_argnums=0)

    @jax.jit
    def rank(energy):
        return jnp.sum(jnp.any(refit(exact(energy), G, P) != 0, axis=0))

    assert [int(rank(energy)) for energy in (0.1, 0.5)] == [
        ranks_of(exact(e), G) for e in (0.1, 0.5)
    ]
    fit = exact(jnp.array(0.1))
    assert (fit == fit, fit == exact(jnp.array(0.1))) == (True, False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("energy", [0.2, 0.04])
def test_randomized_fit_inflates_the_rank_by_less_than_a_step(energy, seed):
    G = spectrum(0.85 ** np.arange(24), seed=seed).astype(np.float32)
    fit = ol.adaptive_rank(ol.randomized_svd(power_iterations=2), energy, min_rank=1, rank_step=2)
    best = ranks_of(exact(energy, rank_step=2), G, cap=16)
    assert best <= ranks_of(fit, G, cap=16) <= best + 2


def test_each_matrix_of_a_stack_has_its_own_rank():
    stack = np.stack([spectrum(np.ones(r), seed=r) for r in (2, 7, 4)]).astype(np.float32)
    tx = ol.low_rank(ol.scale_by_rotated_adam(), rank=8, fit=exact(1e-3))
    params = {"kernel": jnp.asarray(stack)}
    _, state, _ = run(tx, params, [params])
    assert ol.diagnostics(state)["kernel"].rank.tolist() == [2, 7, 4]


# The theorem


def test_rank_falls_to_one_where_the_theorem_holds():
    """Gradient descent in a reversible layer, G_t = (1 − η b_i c_j)^t G_0: κ(t) = 1 − σ_1² / ‖G‖² ≤ c C^−t."""
    random = np.random.default_rng(0)
    b, c, G_0 = (
        random.uniform(0.5, 1, 12),
        random.uniform(0.5, 1, 16),
        random.standard_normal((12, 16)),
    )
    b[0] = c[0] = 0.1  # a gap below the other eigenvalues
    eigenvalues = np.outer(b, c)
    first, second = np.sort(eigenvalues.ravel())[:2]
    rate = 1 / eigenvalues.max()
    C = ((1 - rate * first) / (1 - rate * second)) ** 2
    slowest = G_0[eigenvalues == first] ** 2
    bound = (np.sum(G_0**2) - slowest) / slowest
    tx = ol.low_rank(ol.scale_by_rotated_adam(), rank=12, fit=exact(0.05), refresh=ol.every(10))
    ranks = []
    with jax.enable_x64(True):
        state, update = tx.init({"kernel": jnp.asarray(G_0)}), jax.jit(tx.update)
        for t in range(150):
            G = (1 - rate * eigenvalues) ** t * G_0
            kappa = lost(G)[1]
            assert kappa <= bound * C**-t
            _, state = update({"kernel": jnp.asarray(G)}, state)
            ranks += ol.diagnostics(state)["kernel"].rank.tolist()
    assert kappa < 1e-6
    assert ranks[0] > 5
    assert ranks[-1] == 1
    assert ranks[10:] == sorted(ranks[10:], reverse=True)


def test_noise_raises_the_rank():
    """No such theorem for mini-batches: near a minimum their gradients are noise, which has full rank."""
    random = np.random.default_rng(0)
    signal = spectrum([10.0, 6.0], shape=(64, 64))
    noise = random.standard_normal((64, 64))
    sizes = (0, 0.05, 0.1, 0.2, 0.4)
    ranks = [ranks_of(exact(0.04), (signal + s * noise).astype(np.float32)) for s in sizes]
    assert ranks == sorted(ranks)
    assert ranks[0] == 2
    assert ranks[-1] > 30


# When to refit


def bowl(refresh, steps=400):
    """Gradient descent on ½‖W‖² in a basis of rank 3 of 12: the loss at each step, and the last refits."""
    tx = optax.chain(
        ol.low_rank(optax.identity(), rank=3, fit=ol.svd(), refresh=refresh), optax.scale(-0.2)
    )
    W = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((12, 16)), jnp.float32)}

    def step(carry, _):
        W, state = carry
        updates, state = tx.update(W, state, W)
        W = optax.apply_updates(W, updates)
        return (W, state), (jnp.sum(W["kernel"] ** 2), state[0].stats.last_fit[0])

    _, (loss, last_fit) = jax.lax.scan(step, (W, tx.init(W)), length=steps)
    return np.asarray(loss) / np.sum(np.square(W["kernel"])), np.unique(last_fit)


def test_each_subspace_is_left_in_finite_time():
    """The paper's criterion on a deterministic loss: converge inside, switch, until nothing is left."""
    loss, refits = bowl(ol.on_convergence(0.1, min_gap=1, max_gap=10_000))
    assert 4 <= len(refits) < 40
    assert np.diff(refits).max() < 60
    assert loss[-1] < 1e-6


def test_one_subspace_is_not_enough():
    loss, refits = bowl(ol.every(10_000))
    assert len(refits) == 1
    assert loss[-1] > 0.3


def test_steps_stay_below_one_in_a_subspace_that_is_new():
    """Refit to a disjoint subspace at step 40, the gradient constant before and after."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.standard_normal((12, 12)))[0]
    grads = [part @ random.standard_normal((4, 16)) for part in (U[:, :4], U[:, 4:8])]
    grads = [{"kernel": jnp.asarray(grad, jnp.float32)} for grad in grads]
    tx = ol.low_rank(ol.scale_by_rotated_adam(), rank=4, fit=ol.svd(), refresh=ol.every(40))
    state, update, largest = tx.init(grads[0]), jax.jit(tx.update), 0.0
    for t in range(80):
        updates, state = update(grads[t // 40], state)
        N = state.leaves["kernel"].basis[0].T @ updates["kernel"]
        largest = max(largest, float(jnp.abs(N).max()))
    assert 0.9 < largest < 1.05


@pytest.mark.parametrize("fit", [ol.svd(), ol.randomized_svd()], ids=["svd", "randomized_svd"])
@pytest.mark.parametrize(
    "refresh",
    [ol.every(5), ol.every(5, stagger=True), ol.on_convergence(), ol.on_staleness()],
    ids=["every", "staggered", "on_convergence", "on_staleness"],
)
def test_layers_of_a_stack_are_refit_one_by_one_and_only_when_due(fit, refresh):
    """A batched predicate would make a select of a batched factorization, on every step."""
    tx = ol.adarankgrad(0.01, rank=8, fit=fit, on_convergence=refresh)
    params = {"stack": jnp.ones((3, 24, 40)), "kernel": jnp.ones((24, 40))}
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
    found = list(factorizations(jaxpr.jaxpr))
    assert found
    assert all(inside and len(shape) == 2 for shape, inside in found)


# What it costs


def test_state_has_the_size_of_the_active_rank():
    m, n = 64, 96
    params = {"kernel": jnp.asarray(spectrum(0.5 ** np.arange(32), (m, n)), jnp.float32)}
    tx = ol.adarankgrad(
        0.01, rank=32, fit=ol.svd(), max_residual_energy=1e-3, rank_step=1, min_rank=1
    )
    state, sizes = tx.init(params), []
    for rank in (32, 8, 5):
        assert ol.memory_report(tx, params, state).arrays == 4 * (m * rank + 2 * rank * n + rank)
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(state)))
        _, state, _ = run(tx, params, [params], state)
        state = ol.compact(tx, state, params, multiple_of=8 if rank == 32 else 1)
    assert sizes == sorted(sizes, reverse=True)


def test_ranks_to_try_are_rounded():
    """As what a schedule makes of them."""
    G = jnp.diag(jnp.arange(8.0, 0.0, -1))
    found = [
        ol.adaptive_rank(ol.svd(), 0.1, *ranks)(jax.random.key(0), G, jnp.zeros((8, 8)))
        for ranks in [(2, 3), (2.3, 2.6), (jnp.float32(1.8), jnp.float32(3.4))]
    ]
    assert [int(jnp.sum(jnp.any(P != 0, axis=0))) for P in found] == [5, 5, 5]
