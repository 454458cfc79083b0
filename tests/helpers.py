"""The optimizers and problems that the contract is tested on: a new method is one row in OPTIMIZERS."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache as cache

import optax_lowrank as ol

# Rank 2 projects every matrix of the problems below; gap 3 refits the basis twice in 8 steps. The exact fit
# compiles in a third of the time of the default one, which one row is enough for.
_small = {"rank": 2, "update_proj_gap": 3}
_exact = {"fit": ol.svd(), **_small}
_codes = {"bits": 8, "min_size": 4}
OPTIMIZERS = {
    "galore": functools.partial(ol.galore, **_small),
    "galore_long_side": functools.partial(ol.galore, side="long", rotate_moments=True, **_exact),
    "fira": functools.partial(ol.fira, **_exact),
    # With little damping the Fisher takes out of a gradient what it shares with those before it, which in a
    # problem without noise is nearly all of it.
    "natural_galore": functools.partial(
        ol.natural_galore, damping=1.0, relative_damping=True, **_exact
    ),
    "adarankgrad": functools.partial(ol.adarankgrad, min_rank=1, rank_step=1, **_exact),
    "gradnormlorp": functools.partial(ol.gradnormlorp, **_exact),
    "apollo": functools.partial(ol.apollo, **_small),
    # The only one with a basis that follows its state; by default it has none to store, as `apollo`.
    "low_rank_muon": functools.partial(
        ol.low_rank_muon, rank=2, fit=ol.subspace_iteration(), update_proj_gap=1
    ),
    "galore_8bit": functools.partial(ol.galore, state_bits=_codes, **_exact),
    "gradnormlorp_8bit": functools.partial(ol.gradnormlorp, state_bits=_codes, **_exact),
}

# Trees as users have them; no matrix has a side as long as the vocabulary, or it would be a head. The shapes
# repeat, because each distinct one is compiled anew.
PROBLEMS = {
    "mlp": {
        "embed": {"embedding": (10, 6)},
        "hidden": {"kernel": (6, 8), "bias": (8,)},
        "out": {"kernel": (8, 6), "bias": (6,)},
    },
    "transformer": {
        "embed": {"embedding": (10, 6)},
        "layers": {"mlp": {"kernel": (2, 6, 8), "bias": (2, 8)}},
        "attention": {
            "query": {"kernel": (6, 2, 4), "bias": (2, 4)},
            "out": {"kernel": (2, 4, 6), "bias": (6,)},
        },
    },
    "no_matrix": {"scale": (6,), "bias": (8,), "temperature": ()},
}


def normal_tree(problem, seed, dtype=jnp.float32):
    """Standard normal leaves in the shapes of a problem; the same numbers for every dtype."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), dtype),
        PROBLEMS[problem],
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients(problem, steps, dtype=jnp.float32):
    """A list of `steps` gradients, each independent of the others."""
    return [normal_tree(problem, seed=100 + step, dtype=dtype) for step in range(steps)]


def factorizations(jaxpr, inside=False):
    """(operand's shape, is it inside of a conditional) of every matrix factorization."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("svd", "eigh", "cholesky", "qr", "householder_product"):
            yield eqn.invars[0].aval.shape, inside
        for inner in jax.tree.leaves(eqn.params):
            if hasattr(inner, "eqns"):
                yield from factorizations(inner, inside or eqn.primitive.name == "cond")


def run(tx, params, grads, state=None):
    """Applies the gradients one by one under `jit`: the last parameters and state, all updates."""
    step = compiled_step(tx)
    state = tx.init(params) if state is None else state
    history = []
    for grad in grads:
        params, state, updates = step(params, state, grad)
        history.append(updates)
    return params, state, history


@functools.cache  # many tests compare with the plain optimizer, which compiles once for them all
def compiled_step(tx):
    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


def low_rank_state(state):
    """The one `LowRankState` in the state of an optimizer."""
    is_one = lambda x: isinstance(x, ol.LowRankState)
    (found,) = filter(is_one, jax.tree.leaves(state, is_leaf=is_one))
    return found


@contextlib.contextmanager
def compilation_cache(folder):
    """Within it, programs that are compiled anew come from `folder` if they were compiled before."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        cache.reset_cache()  # or it goes on writing whatever is compiled later


def turning_gradients(shape, steps=14):
    """Gradients of slowly changing direction, (steps, m, n) in float64; gaps in the spectrum keep SVDs comparable."""
    random = np.random.default_rng(sum(shape))
    k = min(shape)
    U, V = (np.linalg.qr(random.standard_normal((size, k)))[0] for size in shape)
    drift = random.standard_normal((steps, *shape)).cumsum(axis=0)
    return (U * 0.7 ** np.arange(k)) @ V.T + 0.01 * drift


def assert_trees_close(got, want, rtol):
    """Equal structure, shapes and dtypes; values within `rtol` of the largest entry of each leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        assert (jnp.shape(a), jnp.asarray(a).dtype) == (jnp.shape(b), jnp.asarray(b).dtype), name
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=name)


def assert_trees_equal(got, want):
    assert_trees_close(got, want, rtol=0)
