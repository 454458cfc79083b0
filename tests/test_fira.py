"""Fira: the paper's trajectories, and what its two parts promise on their own."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import optax_lowrank as ol
from optax_lowrank.limit import subspace_ratio
from optax_lowrank.methods.apollo import channel_scaling
from optax_lowrank.methods.fira import with_residual
from optax_lowrank.rules import as_rule, unturned

from .helpers import (
    assert_trees_close,
    assert_trees_equal,
    low_rank_state,
    run,
    turning_gradients,
)
from .reference import fira as reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
# float32 products of up to 20 terms
ROUNDING = 1e-5


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def trajectory(tx, grads):
    """Updates of one kernel along these gradients, (steps, m, n), and the last state."""
    params = {"kernel": jnp.zeros(grads[0].shape)}
    _, state, updates = run(tx, params, [{"kernel": jnp.asarray(grad)} for grad in grads])
    return np.stack([u["kernel"] for u in updates]), state


def assert_follows(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# The trajectory


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_golden_trace(shape):
    """Over two refreshes. 2e-3: five times what a literal transcription in float32 is off by."""
    trace = np.load(GOLDEN / f"fira_{shape}.npz")
    got, _ = trajectory(
        ol.fira(1.0, fit=ol.svd(), **json.loads(str(trace["config"]))), trace["grads"]
    )
    assert_follows(got, trace["updates"], 2e-3)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)], ids=str)
def test_reference_on_other_gradients(shape):
    """Slowly turning gradients whose sizes jump, so that the limiter works; spectral gaps keep SVDs comparable."""
    sizes = np.geomspace(1, 4, 14)[:, None, None]
    grads = (turning_gradients(shape) * sizes).astype(np.float32)
    config = {"rank": 4, "update_proj_gap": 5, "scale": 0.7, "learning_rate": 0.03, "limit": 1.05}
    config |= {"residual_scale": 0.6, "b1": 0.8, "b2": 0.95, "eps": 1e-6}
    want = reference.reference(grads, **config)
    got, _ = trajectory(ol.fira(fit=ol.svd(), **config), grads)
    # float32 SVDs against float64 ones
    assert_follows(got, want, 2e-3)
    unlimited = reference.reference(grads, **{**config, "limit": np.inf})
    assert np.abs(unlimited - want).max() > 0.05 * np.abs(want).max()


@functools.cache
def parts_of(limit=1.01, steps=7, **scales):
    """Updates with refits at 0, 3 and 6; the first gradient fits the basis so well that little is left over."""
    first = normal(8, 3) @ normal(3, 12, seed=1) + 0.03 * normal(8, 12, seed=2)
    grads = [first, *(normal(8, 12, seed=3 + t) for t in range(steps - 1))]
    return trajectory(
        ol.fira(1.0, rank=3, update_proj_gap=3, fit=ol.svd(), limit=limit, **scales), grads
    )


def test_each_scale_acts_on_its_part_only():
    """update(α, β) = α update(1, 0) + β update(0, 1): neither scale feeds back, the limiter sees none."""
    subspace, _ = parts_of(scale=1.0, residual_scale=0.0)
    residual, _ = parts_of(scale=0.0, residual_scale=1.0)
    both, _ = parts_of(scale=0.3, residual_scale=2.0)
    assert_follows(both, 0.3 * subspace + 2.0 * residual, ROUNDING)


def test_parts_are_orthogonal():
    """PᵀS = 0 on the last step, whereas the other part is P N."""
    subspace, state = parts_of(scale=1.0, residual_scale=0.0)
    residual, _ = parts_of(scale=0.0, residual_scale=1.0)
    P = low_rank_state(state).leaves["kernel"].basis[0]
    assert np.abs(P.T @ residual[-1]).max() < ROUNDING * np.abs(residual[-1]).max()
    assert_follows(P @ (P.T @ subspace[-1]), subspace[-1], ROUNDING)


def test_a_refresh_does_not_reset_the_limiter():
    """Little is left over at first, much later: the norm grows by 1 % on each step, through both refits."""
    residual, _ = parts_of(scale=0.0)
    norms = np.linalg.norm(residual, axis=(1, 2))
    np.testing.assert_allclose(norms[2:] / norms[1:-1], 1.01, rtol=1e-5)
    # of a residual of one percent, ‖G_j‖² − ‖R_j‖² has lost four of its seven digits
    np.testing.assert_allclose(norms[1] / norms[0], 1.01, rtol=3e-3)
    free, _ = parts_of(limit=math.inf, scale=0.0)
    assert np.linalg.norm(free[1]) > 10 * norms[-1]


@functools.cache  # compiled once for all tests
def residual_only(limit):
    return ol.fira(1.0, rank=3, update_proj_gap=3, scale=0.0, fit=ol.svd(), limit=limit)


@pytest.mark.parametrize("bad", ["zero", "zero nan", "nan zero", "zero nan zero nan"])
@pytest.mark.parametrize("start", [2, 3], ids=["between refits", "at a refit"])
def test_residual_is_back_at_full_size_after_bad_gradients(start, bad):
    """As if it had never been limited. A stored 0 that counted as a norm would squash it for 1400 steps."""
    kinds = {"zero": jnp.zeros((8, 12)), "nan": jnp.full((8, 12), jnp.nan)}
    grads = [normal(8, 12, seed=t) for t in range(start)]
    grads += [kinds[kind] for kind in bad.split()] + [normal(8, 12, seed=9)]
    got, _ = trajectory(residual_only(1.01), grads)
    free, _ = trajectory(residual_only(math.inf), grads)
    assert not got[start:-1].any()
    assert_trees_equal(got[-1], free[-1])
    assert np.linalg.norm(got[-1]) > 0.2 * np.linalg.norm(got[start - 1])


def test_a_nan_alone_keeps_the_limit():
    """The step after it may grow from the last good one as if there had been nothing between."""
    good = [normal(8, 12, seed=t) for t in range(3)]
    grads = [good[0], 0.01 * good[1], good[2]]
    bad = jnp.full((8, 12), jnp.nan)
    tx = residual_only(1.01)
    _, before = trajectory(tx, grads[:2])
    _, after = trajectory(tx, [*grads[:2], bad])
    norm = lambda state: low_rank_state(state).leaves["kernel"].rule.norm
    assert_trees_equal(norm(after), norm(before))
    got, _ = trajectory(tx, [*grads[:2], bad, grads[2]])
    assert not got[2].any()
    assert np.linalg.norm(got[3]) <= 1.01 * np.linalg.norm(got[1]) * (1 + ROUNDING)


# The ratio


@pytest.mark.parametrize("axis", [0, None])
def test_ratio_by_hand(axis):
    """‖N_j‖ / ‖R_j‖, of which ‖R_j‖ counts as no less than half of what a random basis holds of a column."""
    N, R, G = (np.array(normal(m, 5, seed=m)) for m in (3, 4, 7))
    R = R[:3]
    R[:, 0] *= 1e-3
    G[:, 1] = N[:, 1] = R[:, 1] = 0
    length = functools.partial(np.linalg.norm, axis=axis)
    held = np.maximum(length(R), np.sqrt(3 / 7) / 2 * length(G))
    got = subspace_ratio(N, R, jnp.sum(jnp.square(G), axis=0), 7, axis)
    np.testing.assert_allclose(got, length(N) / np.where(held > 0, held, 1), rtol=1e-5)
    assert (length(R) < held).tolist() == ([True, False] + [False] * 3 if axis == 0 else False)


def test_ratio_of_silent_columns():
    """No gradient but a step, from momentum: finite, and left to the limiter."""
    N, R = normal(3, 5), jnp.zeros((3, 5))
    assert np.isfinite(subspace_ratio(N, R, jnp.zeros(5), 7)).all()


INNERS = {
    "adam": optax.scale_by_adam(),
    "rotated_adam": ol.scale_by_rotated_adam(),
    "lion": optax.scale_by_lion(),
    "rms": optax.scale_by_rms(),
    "adafactor": optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0)
    ),
}
FITS = {
    "svd": ol.svd(),
    "randomized_svd": ol.randomized_svd(),
    "subspace_iteration": ol.subspace_iteration(),
    "gaussian": ol.gaussian(),
    "adaptive_rank": ol.adaptive_rank(ol.svd(), max_residual_energy=0.5, min_rank=1, rank_step=1),
}


@pytest.mark.parametrize(
    ("inner", "fit"),
    [*((inner, "svd") for inner in INNERS), *(("adam", fit) for fit in FITS if fit != "svd")],
)
def test_the_residual_is_scaled_as_the_coordinates_were(inner, fit):
    """‖S_j‖ / ‖E_j‖ = ‖N_j‖ / ‖R_j‖ in every column on every step, whatever made N and P; S is orthogonal to P."""
    rule = with_residual(as_rule(INNERS[inner]), scale=1.0, limit=1e6)
    tx = ol.low_rank(rule, rank=3, fit=FITS[fit], refresh=ol.every(2))
    state, update = tx.init({"kernel": normal(8, 12)}), jax.jit(tx.update)
    for step in range(4):
        G = np.asarray(normal(8, 12, seed=step))
        updates, state = update({"kernel": G}, state)
        P, U = np.asarray(state.leaves["kernel"].basis[0]), np.asarray(updates["kernel"])
        R, N = P.T @ G, P.T @ U
        E, S = G - P @ R, U - P @ N
        length = functools.partial(np.linalg.norm, axis=0, keepdims=True)
        used = np.any(P != 0, axis=0).sum()
        held = np.maximum(length(R), np.sqrt(used / 8) / 2 * length(G))
        # a column of R may be ten times shorter than its neighbours, which magnifies rounding
        np.testing.assert_allclose(length(S) * held, length(N) * length(E), rtol=1e-3)
        assert_follows(S / length(S), E / length(E), 1e-3)


# The limiter


@functools.cache
def limiter(limit, batch_axes=0):
    tx = ol.limit_norm_growth(limit, batch_axes)
    return tx, jax.jit(tx.update)


DIRECTION = np.array([[0.6, 0.0], [0.0, -0.8]], np.float32)
sizes = st.one_of(st.sampled_from([0.0, math.nan]), st.floats(-4, 4).map(lambda x: 10**x))


@given(sizes=st.lists(sizes, min_size=1, max_size=12), limit=st.sampled_from([1.0, 1.01, 2.0]))
def test_norms_grow_by_at_most_the_limit(sizes, limit):
    """The recursion in words: free without a previous norm, else the smaller of size and limit · previous."""
    tx, update = limiter(limit)
    state, previous = tx.init(jnp.zeros((2, 2))), 0.0
    for size in sizes:
        S, state = update(np.float32(size) * DIRECTION, state)
        if math.isnan(size):
            assert np.isnan(S).all()
        else:
            previous = min(size, limit * previous) if previous > 0 else size
            # float32; the direction stays
            np.testing.assert_allclose(S, previous * DIRECTION, rtol=1e-5, atol=0)
            assert np.linalg.norm(S) <= size * (1 + 1e-6)
        np.testing.assert_allclose(state.norm, previous, rtol=1e-5)


def test_growth_of_a_long_run_is_exact():
    """Norms of 1.01^t for 200 steps: rounding does not add up to a drift."""
    tx, update = limiter(1.01)
    _, state = update(DIRECTION, tx.init(DIRECTION))
    for _ in range(200):
        S, state = update(1e6 * DIRECTION, state)
    np.testing.assert_allclose(np.linalg.norm(S), 1.01**200, rtol=200 * 2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_and_leaves_the_norm(bad):
    tx, update = limiter(1.5)
    _, before = update(DIRECTION, tx.init(DIRECTION))
    S, after = update(np.array([[bad, 1.0], [1.0, 1.0]], np.float32), before)
    assert not np.isfinite(S).all()
    assert_trees_equal(after, before)


@pytest.mark.parametrize("batch_axes", [1, 2])
def test_one_limit_a_layer(batch_axes):
    """A stack is a loop over its layers, also where one of them is NaN; in a tree, leaf by leaf."""
    batch, (tx, update) = (2, 3)[:batch_axes], limiter(1.1, batch_axes)
    single, update_one = limiter(1.1)
    steps = [normal(*batch, 4, 5, seed=t) * 2.0 ** (t % 3) for t in range(5)]
    steps[2] = steps[2].at[(1,) * batch_axes].set(jnp.nan)
    tree, state, got = {"a": steps[0], "b": steps[1]}, None, []
    state = tx.init(tree)
    for t in range(4):
        updates, state = update({"a": steps[t], "b": steps[t + 1]}, state)
        got.append(updates)
    assert state.norm["a"].shape == batch
    for name, offset in (("a", 0), ("b", 1)):
        for index in np.ndindex(*batch):
            state_one = single.init(steps[0][index])
            for t in range(4):
                want, state_one = update_one(steps[t + offset][index], state_one)
                np.testing.assert_allclose(got[t][name][index], want, rtol=1e-6)
            np.testing.assert_allclose(state.norm[name][index], state_one.norm, rtol=1e-6)


def test_stacked_leaf_is_a_loop_over_its_layers():
    """Layers of very different growth, so that a limit on the whole stack would show."""
    growth = np.array([1.0, 4.0, 0.25], np.float32)[:, None, None]
    stacks = [normal(3, 8, 6, seed=t) for t in range(5)]
    stacks[0] = stacks[0].at[1].set(normal(8, 2) @ normal(2, 6) + 0.01 * stacks[0][1])
    stacks = [stack * growth**t for t, stack in enumerate(stacks)]
    tx = ol.fira(1.0, rank=2, update_proj_gap=2, fit=ol.svd())
    got, _ = trajectory(tx, stacks)
    layers = [trajectory(tx, [stack[i] for stack in stacks])[0] for i in range(3)]
    # two programs, and refits amplify rounding
    assert_trees_close(got, np.stack(layers, axis=1), 1e-4)


# Memory and errors


@pytest.mark.parametrize("around", [with_residual, channel_scaling])
def test_a_change_of_basis_costs_nothing_where_moments_do_not_turn(around):
    """`low_rank` computes P_newᵀ P_old only for a rule that asks for it."""
    assert around(as_rule(optax.scale_by_adam())).turn is unturned
    assert around(ol.scale_by_rotated_adam()).turn is not unturned


def test_state_is_that_of_galore_and_a_float_a_matrix():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"kernel": leaf(64, 96), "layers": {"kernel": leaf(5, 96, 64)}, "bias": leaf(96)}
    fira, galore = (ol.memory_report(make(0.1, rank=8), params) for make in (ol.fira, ol.galore))
    assert fira.state - galore.state == 4 * (1 + 5)


@pytest.mark.parametrize("make", [ol.limit_norm_growth, functools.partial(ol.fira, 0.1)])
def test_limit_that_stops_the_update(make):
    with pytest.raises(ValueError, match=r"`limit` must be at least 1, got 0\.9"):
        make(limit=0.9)


@pytest.mark.parametrize("noise", [0.01, 0.0])
def test_the_limiter_knows_the_residual_of_a_bfloat16_basis(noise):
    """Which is not quite orthonormal: by ‖G_j‖² − ‖R_j‖² alone the norm would be 3 to 15 times as large."""
    common = normal(64, 4) @ normal(4, 96, seed=1)
    grads = [common + noise * normal(64, 96, seed=2 + t) for t in range(4)]
    tx = ol.fira(1.0, rank=4, fit=ol.svd(), scale=0.0, state_bits={"min_size": 10**9})
    residual, state = trajectory(tx, grads)
    norm = low_rank_state(state).leaves["kernel"].rule.norm[0]
    np.testing.assert_allclose(norm, np.linalg.norm(residual[-1]), rtol=0.02)
