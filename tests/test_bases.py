"""Stored bases: orthonormal where they are used, whatever they are stored in, and columns that can be cut."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_lowrank as ol
from optax_lowrank.bases import CodedBasis, _drawn
from optax_lowrank.linalg import dct_columns
from optax_lowrank.refit import _key, seeds_of

from .helpers import assert_trees_close, assert_trees_equal

STORES = {"bfloat16": ol.InDtype(jnp.bfloat16), "8": ol.InCodes(8), "4": ol.InCodes(4)}
coded = pytest.mark.parametrize("bits", [8, 4])
round_trip = jax.jit(
    lambda store, P: store.decode(store.encode(P), P.shape[-2], P.dtype), static_argnums=0
)
# rows of very different size, or columns with one large entry, are the hard cases
KINDS = {
    "normal": lambda random, m, r: random.standard_normal((m, r)),
    "rows": lambda random, m, r: (
        random.standard_normal((m, r)) * np.exp(2 * random.standard_normal((m, 1)))
    ),
    "spikes": lambda random, m, r: random.standard_cauchy((m, r)),
    "identity": lambda random, m, r: np.eye(m, r),
}


def basis(kind, seed, m, r):
    P, _ = np.linalg.qr(KINDS[kind](np.random.default_rng(seed), m, r))
    return jnp.asarray(P, jnp.float32)


@coded
@hypothesis.given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(300, 12), (47, 47), (129, 3)]),
    unused=st.integers(0, 2),
)
def test_coded_bases_are_orthonormal_and_close(bits, kind, seed, shape, unused):
    P = basis(kind, seed, *shape).at[:, shape[1] - unused :].set(0)
    Q = round_trip(ol.InCodes(bits), P)
    used = np.diag(np.arange(shape[1]) < shape[1] - unused)
    np.testing.assert_allclose(Q.T @ Q, used, atol=1e-5)
    assert not np.any(Q[:, shape[1] - unused :])
    # the share of the subspace that is lost: squared relative error of the codes
    lost = 1 - np.sum(np.square(Q.T @ P)) / max(shape[1] - unused, 1)
    assert lost < {8: 1e-3, 4: 0.06}[bits]


def test_bytes_of_codes():
    P = jnp.zeros((3, 301, 7))
    eight, four = ol.InCodes(8).encode(P), ol.InCodes(4).encode(P)
    assert isinstance(eight, CodedBasis)
    assert (eight.codes.shape, eight.block_scale.shape) == ((3, 301, 7), (3, 2, 7))
    assert (four.codes.shape, four.block_scale.shape) == ((3, 301, 7), (3, 3, 7))  # an odd length
    assert ol.InCodes(4).encode(P[:, :300]).codes.shape == (3, 150, 7)


@coded
def test_columns_of_codes_can_be_cut(bits):
    P = jnp.stack([basis("normal", seed, 31, 5) for seed in range(2)])
    store = ol.InCodes(bits)
    cut = jax.tree.map(lambda x: x[..., :3], store.encode(P))
    assert_trees_equal(cut, store.encode(P[..., :3]))


def test_other_bits():
    with pytest.raises(ValueError, match="8 or 4"):
        ol.gradnormlorp(0.01, basis_bits=2)


def gradients(steps, shapes=None):
    shapes = shapes or {"kernel": (33, 48), "stack": (3, 48, 32)}
    random = np.random.default_rng(0)
    left = {k: random.standard_normal((*s[:-1], 6)) for k, s in shapes.items()}
    make = lambda k, s: left[k] @ random.standard_normal((*s[:-2], 6, s[-1]))
    return [
        {k: jnp.asarray(make(k, s), jnp.float32) for k, s in shapes.items()} for _ in range(steps)
    ]


@functools.cache
def train(store, steps=5):
    """Updates, and the last state; a refit at the fourth."""
    tx = optimizer(store)
    grads, update = gradients(steps), jax.jit(tx.update)
    params, state, outs = grads[0], jax.jit(tx.init)(grads[0]), []
    for grad in grads:
        out, state = update(grad, state, params)
        outs.append(out)
    assert update._cache_size() == 1
    return outs, state


def optimizer(store):
    options = {"rank": 6, "fit": ol.svd(), "refresh": ol.every(3), "side": "both"}
    return ol.low_rank(ol.rotated(optax.trace(0.9)), scale=0.1, basis_store=store, **options)


@pytest.mark.parametrize("store", STORES)
def test_training_with_stored_bases_stays_near(store):
    (exact, _), (outs, state) = train(ol.InDtype()), train(STORES[store])
    error = {"bfloat16": 0.1, "8": 0.1, "4": 0.6}[store]
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(outs), strict=True):
        assert 0 < jnp.linalg.norm(a - b) < error * jnp.linalg.norm(a)
    for report in ol.diagnostics(state).values():
        assert np.all(np.asarray(report.rank) == 6)
        assert np.all(np.asarray(report.captured_energy) > 0.9)


@coded
def test_a_full_basis_in_codes_is_the_inner_transformation(bits):
    grads = gradients(1, {"kernel": (16, 24)})[0]
    tx = ol.low_rank(optax.identity(), rank=16, fit=ol.svd(), basis_store=ol.InCodes(bits))
    np.testing.assert_allclose(
        jax.jit(tx.update)(grads, tx.init(grads))[0]["kernel"], grads["kernel"], atol=2e-4
    )


@coded
def test_a_step_without_refit_keeps_the_codes_bit_for_bit(bits):
    _, state = train(ol.InCodes(bits))
    grads = gradients(5)[4]
    _, after = jax.jit(optimizer(ol.InCodes(bits)).update)(grads, state, grads)
    for path, leaf in state.leaves.items():
        assert_trees_equal(leaf.basis, after.leaves[path].basis)


@coded
def test_resize_compact_and_report(bits):
    tx, (_, state) = optimizer(ol.InCodes(bits)), train(ol.InCodes(bits))
    grads = gradients(5)[4]
    report = ol.memory_report(tx, grads, state)
    assert report.state == sum(x.nbytes for x in jax.tree.leaves(state))
    smaller = ol.resize(tx, state, grads, 4)
    assert ol.diagnostics(smaller)["stack"].rank.tolist() == [4, 4, 4]
    assert {x.shape[-1] for x in jax.tree.leaves(smaller.leaves["kernel"].basis)} == {4}
    wider = ol.resize(tx, smaller, grads, 6)
    assert ol.diagnostics(wider)["kernel"].rank.tolist() == [4]
    assert jax.tree.map(jnp.shape, wider) == jax.tree.map(jnp.shape, state)
    out, _ = jax.jit(tx.update)(grads, smaller, grads)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))


@coded
def test_compaction_cuts_codes(bits):
    grads = gradients(1, {"kernel": (33, 48)})[0]
    adaptive = ol.adaptive_rank(ol.svd(), 1e-6, min_rank=2, rank_step=2)
    tx = ol.low_rank(optax.identity(), rank=16, fit=adaptive, basis_store=ol.InCodes(bits))
    before, state = jax.jit(tx.update)(grads, tx.init(grads))
    small = ol.compact(tx, state, grads, multiple_of=2)
    assert ol.diagnostics(small)["kernel"].rank.tolist() == [6]
    assert jax.tree.leaves(small.leaves["kernel"].basis)[-1].shape[2] == 6
    assert_trees_close(jax.jit(tx.update)(grads, small)[0], before, 1e-4)


@coded
def test_checkpoints_hold_codes(bits, tmp_path):
    tx, (_, state) = optimizer(ol.InCodes(bits)), train(ol.InCodes(bits))
    grads = gradients(5)[4]
    small = ol.resize(tx, state, grads, 4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", small)
        checkpointer.wait_until_finished()
        saved = checkpointer.metadata(tmp_path / "state").item_metadata
        restored = checkpointer.restore(tmp_path / "state", ol.abstract_state(tx, grads, saved))
    assert_trees_equal(small, restored)


def test_codes_in_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(gradients(1)[0]["kernel"])

    model = Model()
    tx = ol.gradnormlorp(0.01, rank=4, basis_bits=4)
    wrapped = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    nnx.jit(lambda model, wrapped, grads: wrapped.update(model, grads))(model, wrapped, grads)
    assert ol.diagnostics(wrapped.opt_state)["kernel"].rank.tolist() == [4]
    assert ol.resize(tx, wrapped.opt_state, grads, 2) is not None


# Bases that are not stored

IMPLICIT = {"seeded": ol.seeded(), "dct": ol.dct()}
implicit = pytest.mark.parametrize("fit", IMPLICIT.values(), ids=IMPLICIT)
read = jax.jit(
    lambda basis, stored, key, m, r: basis.read(stored, key, m, r, jnp.float32),
    static_argnums=(0, 3, 4),
)


@implicit
@pytest.mark.parametrize("shape", [(300, 12), (47, 47), (129, 3)], ids=str)
def test_what_is_made_anew_is_orthonormal(fit, shape):
    """And the same for the same key and stored columns."""
    m, r = shape
    key, G = (
        jax.random.key(3),
        jnp.asarray(np.random.default_rng(0).standard_normal((m, 20)), jnp.float32),
    )
    stored, good = fit.refit(key, G, jnp.zeros(shape))
    P = read(fit, stored, key, m, r)
    assert good
    assert P.shape == shape
    np.testing.assert_allclose(P.T @ P, np.eye(r), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(P, read(fit, stored, key, m, r))


def test_seeds_of_matrices_and_refits_differ():
    bases = [read(ol.seeded(), (), jax.random.key(seed), 40, 5) for seed in range(4)]
    for i, P in enumerate(bases):
        assert all(np.abs(P - other).max() > 0.01 for other in bases[:i])


def test_keys_of_matrices_and_updates_draw_what_is_unlike():
    """Two layers of two leaves in runs of two seeds; consecutive updates have consecutive keys."""
    seeds = np.concatenate([seeds_of(seed, path, 2) for seed in (0, 1) for path in ("a", "b")])
    numbers = lambda seeds, count: jax.random.normal(_key(seeds, count), (2000,))
    draw = jax.vmap(jax.vmap(numbers, (None, 0)), (0, None))
    drawn = draw(seeds, jnp.arange(-1, 4)).reshape(40, 2000)
    assert np.abs(np.corrcoef(drawn) - np.eye(40)).max() < 5 / 2000**0.5


def test_dct_takes_the_columns_that_hold_most():
    """A gradient made of the columns 3, 17 and 8, strongest first, and a little of 1."""
    columns = dct_columns(24, jnp.array([3, 17, 8, 1]), jnp.float32)
    G = columns @ jnp.diag(jnp.array([4.0, 3.0, 2.0, 0.1])) @ jnp.eye(4, 30)
    stored, _ = ol.dct().refit(jax.random.key(0), G, jnp.zeros((24, 3)))
    assert stored.tolist() == [[3, 17, 8]]


@implicit
@pytest.mark.parametrize("side", ["short", "both"])
def test_between_refits_the_basis_is_that_of_the_refit(fit, side):
    """The identity projects: a gradient and its update have the same update as long as the basis stands."""
    tx = ol.low_rank(optax.identity(), rank=6, fit=fit, refresh=ol.every(2), side=side)
    grads, update = gradients(3), jax.jit(tx.update)
    first, state = update(grads[0], tx.init(grads[0]))
    leaves, treedef = jax.tree.flatten(state)  # nothing but arrays is remembered
    copy = treedef.unflatten(jnp.asarray(np.array(x)) for x in leaves)
    again, _ = update(first, copy)
    assert_trees_close(again, first, 1e-4)
    _, state = update(grads[1], state)
    moved, _ = update(first, state)  # a refit
    if fit == ol.seeded():
        assert jnp.linalg.norm(moved["kernel"] - first["kernel"]) > 0.1 * jnp.linalg.norm(
            first["kernel"]
        )


def test_seeded_bases_draw_all_columns_alike_and_none_twice():
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.vmap(lambda key: _drawn(jax.random.bits(key, (16,)), 4))(keys))
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=16)
    assert counts.size == 16
    assert 850 < counts.min() <= counts.max() < 1150


def test_every_column_of_a_dct_is_used():
    """Also the one of number 0: what is stored are numbers, and no column of zeros is among them."""
    columns = dct_columns(24, jnp.arange(5), jnp.float32)
    G = {"w": columns * jnp.arange(1.0, 6)[None] @ jnp.ones((5, 40))}  # 0 is the weakest, the last
    tx = ol.low_rank(optax.scale_by_adam(), rank=5, fit=ol.dct())
    _, state = tx.update(G, tx.init(G))
    assert state.leaves["w"].basis.tolist() == [[[4, 3, 2, 1, 0]]]
    assert ol.diagnostics(state)["w"].rank.tolist() == [5]
    assert ol.compact(tx, state, G, multiple_of=1) is state


def test_a_dct_on_both_sides_keeps_small_coordinates():
    """Its columns are exact, so that what is small after a refit is no round-off."""
    left, right = (dct_columns(n, jnp.arange(2), jnp.float32) for n in (12, 16))
    G = {"w": left @ jnp.array([[1.0, 1e-3], [2e-3, 0.5]]) @ right.T}
    tx = ol.low_rank(optax.identity(), rank=2, fit=ol.dct(), side="both")
    update, _ = tx.update(G, tx.init(G))
    np.testing.assert_allclose(update["w"], G["w"], atol=1e-6)


@pytest.mark.parametrize(("fit", "a_basis"), [("seeded", 0), ("dct", 4 * 8)])
def test_bytes_of_what_is_made_anew(fit, a_basis):
    shapes = {"stack": jax.ShapeDtypeStruct((3, 64, 96), jnp.float32)}
    report = ol.memory_report(ol.galore(0.1, rank=8, fit=IMPLICIT[fit]), shapes)
    assert report.arrays == 3 * (2 * 4 * 8 * 96 + a_basis)
