"""What must be set before JAX is first imported, and how the whole suite runs."""

import gc
import os
from pathlib import Path

from tests import QUICK_COMPILATION

# Threaded LAPACK beside other busy processes (test workers) is slower by orders of magnitude.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The sharding tests need several devices; all others use the first.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        QUICK_COMPILATION,
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import hypothesis
import jax

# (n,) + (m, n) broadcasts silently, and in matrix code it is nearly always a bug.
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, because a first example compiles; no randomness, so that no run fails by chance.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("repeatable")

# Tracing makes many small objects that stay; to look through all of them often is a tenth of the suite's time.
gc.set_threshold(100_000, 50, 100)

_MAPS = Path("/proc/self/maps")
_tests_run = 0


def pytest_runtest_teardown():
    """Unloads the compiled programs of many tests: Linux grants a process 65,530 memory mappings, a test holds a few
    hundred, and XLA crashes without them."""
    global _tests_run
    _tests_run += 1
    if _tests_run % 8 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
        gc.collect()
