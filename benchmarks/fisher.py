"""What `scale_by_woodbury_fisher` costs, in products of its history with a gradient."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_lowrank as ol
from benchmarks.tables import Options, Table
from benchmarks.timing import NOTE, clocked, milliseconds, ratio, take_turns


def fisher(options: Options) -> Table:
    """One step of the Fisher preconditioner against one pass over its history, H g."""
    shapes = ((4, 24),) if options.quick else ((128, 1376), (512, 5461))
    rows = []
    for shape in shapes:
        for history in (4, 20):
            random = np.random.default_rng(0)
            g = jnp.asarray(random.standard_normal(shape, np.float32))
            H = jnp.asarray(random.standard_normal((history, g.size), np.float32))
            product = jax.jit(lambda H, g: H @ g.reshape(-1))
            tx = ol.scale_by_woodbury_fisher(history)
            step = jax.jit(tx.update, donate_argnums=1)
            holder = [tx.init(g)]

            def one_step(step=step, g=g, holder=holder):
                updates, holder[0] = step(g, holder[0])
                return updates

            calls = {"H g": lambda H=H, g=g, product=product: product(H, g), "step": one_step}
            seconds = take_turns({name: clocked(call) for name, call in calls.items()}, 25)
            cells = (f"{shape[0]}×{shape[1]}", str(history))
            times = (milliseconds(seconds["H g"]), milliseconds(seconds["step"]))
            rows.append((*cells, *times, f"{ratio(seconds['step'], seconds['H g']):.2f}"))
    return Table(("coordinates", "history", "H g, ms", "step, ms", "ratio"), rows, (NOTE,))
