"""Many refits in one program: LAPACK calls that run at once have hung jax 0.10 on two cores."""

import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import optax_lowrank as ol

random = np.random.default_rng(0)
shapes = [(16 + 4 * i, 24 + 4 * j) for i in range(5) for j in range(3)]
params = {f"{m}x{n}": {"kernel": (4, m, n)} for m, n in shapes}
params = jax.tree.map(lambda s: jnp.asarray(random.standard_normal(s), jnp.float32), params,
                      is_leaf=lambda x: isinstance(x, tuple))
# moments that turn, or widths would share a program
tx = ol.galore(0.1, rank=8, update_proj_gap=2, rotate_moments=True)
update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
for _ in range(5):
    updates, state = update(params, state, params)
jax.block_until_ready(state)
report = ol.diagnostics(state)
assert len(report) == 15 and all((leaf.steps_since_refresh == 0).all() for leaf in report.values())
print("done")
"""


def test_a_tree_of_many_shapes_and_layers_is_refit():
    """15 shapes of 4 layers each, three times. In its own process: a hang in LAPACK cannot be interrupted."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "done\n", done.stderr
