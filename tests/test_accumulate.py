"""Micro-batches: k of them are one update of their mean, summed in the subspace."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_lowrank as ol
from optax_lowrank import refresh

from .helpers import compiled_step, run as run_compiled

K = 3
PARAMS = {
    "kernel": jnp.full((2, 12, 16), 0.1, jnp.float32),
    "bias": jnp.zeros(12),
}  # two layers of a stack


def micro_batches(count, seed=0):
    random = np.random.default_rng(seed)
    make = lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32))
    return [jax.tree.map(make, PARAMS) for _ in range(count)]


def assert_close(got, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def of_columns(key, G, P):
    """A fit that goes by the gradient alone, and leaves no coordinates that are zero up to round-off."""
    return jnp.linalg.qr((G + 0.5 * jnp.roll(G, 1, axis=1))[:, : P.shape[1]])[0]


@functools.cache  # each compiles once
def alias(name, **changed):
    options = {"rank": 4, "update_proj_gap": 100, "fit": of_columns, "weight_decay": 0.1}
    schedule = optax.linear_schedule(0.1, 0.05, 4)
    return getattr(ol, name)(schedule, **options | changed)


def run(tx, batches):
    params, state, moves = run_compiled(tx, PARAMS, batches)
    return moves, params, state


@pytest.mark.parametrize(
    ("name", "rotate"),
    [("galore", False), ("natural_galore", False), ("adarankgrad", True), ("gradnormlorp", True)],
)
def test_equals_multi_steps_between_refreshes(name, rotate):
    # one gradient in all micro-batches of the first window, so that both fit the same basis; then real ones
    first, *rest = micro_batches(1 + 3 * K)
    ours = alias(name, accumulate=K, rotate_moments=rotate)
    theirs = optax.MultiSteps(alias(name, rotate_moments=rotate), K)
    moves, params, _ = run(ours, [first] * K + rest)
    expected, theirs_params, _ = run(theirs, [first] * K + rest)
    for ours_here, expected_here in zip(moves, expected, strict=True):
        assert_close(ours_here, expected_here, atol=1e-5)
    assert_close(params, theirs_params, atol=1e-5)


def test_updates_within_a_window_are_zero_and_change_nothing_else():
    tx = alias("galore", accumulate=K)
    moves, _, state = run(tx, micro_batches(2 * K))
    for i, updates in enumerate(moves):
        moved = [bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)]
        assert moved == [i % K == K - 1] * len(moved)
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    counts = [s.count.tolist() for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    assert sorted(counts, key=str) == [2, [2, 2]]  # of the bias, and of both layers


@pytest.mark.parametrize("name", ["adarankgrad", "gradnormlorp"])
def test_moments_are_told_of_the_refit_at_the_beginning_of_the_window(name):
    # every window has one gradient, so that its basis is that of the mean: then windows are steps, refits included
    distinct = micro_batches(4)
    options = {"update_proj_gap": 2, "rotate_moments": True}
    windows = [grads for grads in distinct for _ in range(K)]
    _, params, _ = run(alias(name, accumulate=K, **options), windows)
    _, expected, _ = run(alias(name, **options), distinct)
    assert_close(params, expected, atol=2e-5)


def test_basis_stands_during_a_window():
    tx = alias("galore", accumulate=K, update_proj_gap=1)
    state, bases = tx.init(PARAMS), []
    for grads in micro_batches(2 * K):
        _, state, _ = compiled_step(tx)(PARAMS, state, grads)
        bases.append(low_rank_leaf(state).basis)
    changed = [bool(jnp.any(a != b)) for a, b in itertools.pairwise(bases)]
    assert changed == [i % K == K - 1 for i in range(2 * K - 1)]


def low_rank_leaf(state):
    return state[0].inner_states["matrix"].inner_state.leaves["kernel"]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_micro_batch_that_is_not_finite_counts_as_zero(bad):
    batches = micro_batches(2 * K)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(bad), batches[4])
    broken["kernel"] = broken["kernel"].at[1].set(bad)  # both layers
    tx = alias("galore", accumulate=K)
    _, params, state = run(tx, [*batches[:4], broken, batches[5]])
    _, expected, _ = run(tx, [*batches[:4], nothing, batches[5]])
    assert_close(params, expected, atol=1e-6)
    assert ol.diagnostics(state)["kernel"].skips.tolist() == [1, 1]


def test_matrix_whose_window_ends_badly_steps_with_the_next_one():
    batches = micro_batches(3 * K)
    broken = batches[2 * K - 1] | {"kernel": batches[2 * K - 1]["kernel"].at[1, 0, 0].set(jnp.nan)}
    tx = lossless()
    good = [updates["kernel"] for updates in run(tx, batches)[0]]
    bad = [
        updates["kernel"]
        for updates in run(tx, [*batches[: 2 * K - 1], broken, *batches[2 * K :]])[0]
    ]
    assert not jnp.any(bad[2 * K - 1][1])
    np.testing.assert_allclose(bad[2 * K - 1][0], good[2 * K - 1][0], atol=1e-5)
    both = good[2 * K - 1] + good[3 * K - 1]
    without_the_broken = both[1] + batches[2 * K - 1]["kernel"][1] / K
    np.testing.assert_allclose(bad[3 * K - 1][1], without_the_broken, atol=1e-5)


def test_a_window_has_micro_batches():
    with pytest.raises(ValueError, match="`in_windows` needs k >= 1"):
        ol.in_windows(ol.every(100), 0)


def lossless():
    """The mean gradient of each window, by way of a subspace that holds all of it."""
    policy = ol.in_windows(ol.every(100), K)
    core = ol.low_rank(ol.accumulated(optax.identity(), K), rank=12, refresh=policy, fit=ol.svd())
    return ol.assemble(core, 1.0, rank=4, accumulate=K)


def test_late_refit_turns_what_other_layers_have_summed():
    # layer 1 has no gradient at the beginning of the window, so that its basis comes with the second micro-batch
    batches = micro_batches(K)
    batches[0]["kernel"] = batches[0]["kernel"].at[1].set(0)
    moves, *_ = run(lossless(), batches)
    expected = -mean([grads["kernel"] for grads in batches])
    np.testing.assert_allclose(moves[-1]["kernel"], expected, atol=1e-5)


def test_policies_count_windows():
    stats = refresh.initial_statistics(2)._replace(
        last_fit=jnp.array([0, 8]), norm=jnp.array([0.1, 0.1]), fit_norm=jnp.ones(2)
    )
    policy = ol.in_windows(ol.on_convergence(0.3, min_gap=2, max_gap=50), 4)
    assert policy(jnp.int32(12), stats).tolist() == [True, False]  # windows 3, 0 and 2
    assert policy(jnp.int32(13), stats).tolist() == [False, False]  # not the first micro-batch
    assert ol.in_windows(ol.on_staleness(0.5), 4).watches_captured


def test_memory_is_that_of_coordinates():
    shapes = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    bytes_of = lambda tx: ol.memory_report(tx, shapes).arrays
    plain = bytes_of(ol.galore(1e-3, rank=128))
    assert bytes_of(ol.galore(1e-3, rank=128, accumulate=K)) - plain == 4 * 128 * 4096
    rotating = functools.partial(ol.galore, 1e-3, rank=128, rotate_moments=True)
    assert bytes_of(rotating(accumulate=K)) - bytes_of(rotating()) == 4 * 128 * 4096


def test_one_trace():
    tx = alias("galore", accumulate=K)
    run(tx, micro_batches(2 * K + 1))
    assert compiled_step(tx)._cache_size() == 1


def test_sums_of_bfloat16_gradients_are_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = jax.eval_shape(ol.galore(0.1, rank=4, accumulate=K).init, params)
    dense = state[0].inner_states["dense"].inner_state
    assert dense.acc_grads["bias"].dtype == low_rank_leaf(state).rule.mean.dtype == jnp.float32


def test_resize_cuts_the_sums():
    tx = alias("galore", accumulate=K)
    batches = micro_batches(K)
    *_, state = run(tx, batches[:1])
    smaller = ol.resize(tx, state, PARAMS, 2)
    mean = low_rank_leaf(smaller).rule.mean
    np.testing.assert_array_equal(mean, low_rank_leaf(state).rule.mean[:, :2])
    _, state, moves = run_compiled(tx, PARAMS, batches[1:], smaller)
    assert low_rank_leaf(state).rule.mean.shape == (2, 2, 16)
    assert jnp.all(jnp.isfinite(moves[-1]["kernel"]))
    assert jnp.any(moves[-1]["kernel"] != 0)


@pytest.mark.parametrize("k", [0, -1, 2.0])
def test_bad_windows_are_errors(k):
    with pytest.raises(ValueError, match="`accumulate` must be a positive number"):
        ol.galore(1e-3, accumulate=k)


@pytest.mark.parametrize("name", ["fira", "apollo", "low_rank_muon"])
def test_some_methods_need_whole_gradients(name):
    with pytest.raises(ValueError, match=rf"`accumulate` must be 1 in `{name}`, got 2.*MultiSteps"):
        getattr(ol, name)(1e-3, accumulate=2)


def test_a_rule_that_weighs_columns_cannot_be_accumulated():
    weighs = ol.Rule(
        lambda R: (), lambda state, turn: state, lambda R, columns, state: (None, R[0], state)
    )
    tx = ol.low_rank(ol.accumulated(weighs, 2), rank=4, refresh=ol.in_windows(ol.every(9), 2))
    grads = {"kernel": PARAMS["kernel"]}
    with pytest.raises(ValueError, match="whole gradients"):
        jax.eval_shape(tx.update, grads, tx.init(grads))


def test_resumes_in_the_middle_of_a_window(tmp_path):
    tx = alias("galore", accumulate=K)
    batches = micro_batches(K)
    *_, state = run(tx, batches[:2])
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        restored = manager.restore(0, args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))
    expected, got = (run_compiled(tx, PARAMS, batches[2:], x)[2][0] for x in (state, restored))
    assert jnp.any(got["kernel"] != 0)
    assert_close(got, expected, atol=0)
