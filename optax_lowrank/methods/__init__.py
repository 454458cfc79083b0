"""The methods, one file each: the update rule of the paper, its rule of one matrix, its optimizer.

A new one is a file of about a hundred lines here; `apollo.py` shows how:

* the paper's update rule in the docstring, in the letters of `low_rank.py`;
* a `Rule` of one matrix: `init(R)`, `step(R, columns, state) -> (A, c, state)`, `turn(state, turn)` when the basis has
  changed, and, if the next basis should hold more than the gradient, `recall(state)`. No batch axis, no path, no other
  matrix: `low_rank` maps it over stacks and leaves. What happens in full space, to weights before or to steps after,
  is a `Geometry`, as in `gradnormlorp.py` and `low_rank_muon.py`;
* an optimizer that makes one of `Options`.

Then one line in `optax_lowrank/__init__.py`, one row in `tests/helpers.py`, which buys the whole contract suite, a
NumPy transcription in `tests/reference/`, and one line in CHANGELOG.md.
"""
