"""The transcriptions in `reference/` give the golden traces, so either can judge the library."""

import json
import pathlib

import numpy as np
import pytest

from .reference import adarankgrad, fira, galore, gradnormlorp, natural_galore

GOLDEN = pathlib.Path(__file__).parent / "golden"
METHODS = {
    # Tolerance, relative to the largest entry. The traces are stored in float32 (6e-8); GaLore's
    # were also computed in float32, by the authors' PyTorch package, and Adam's division adds to it.
    "galore": (galore, 1e-4),
    "fira": (fira, 1e-6),
    "natural": (natural_galore, 1e-6),
    "adarank": (adarankgrad, 1e-6),
    "gradnorm": (gradnormlorp, 1e-6),
}


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
@pytest.mark.parametrize("method", METHODS)
def test_reference_gives_golden_trace(method, shape):
    trace = np.load(GOLDEN / f"{method}_{shape}.npz")
    config = json.loads(str(trace["config"]))
    if "params" in trace:
        config["params"] = trace["params"]
    module, tolerance = METHODS[method]
    got, want = module.reference(trace["grads"], **config), trace["updates"]
    if "ranks" in trace:
        got, ranks = got
        np.testing.assert_array_equal(ranks, trace["ranks"])
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
