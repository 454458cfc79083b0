"""Each page of `examples/recipes` trains, and its optimizer is active: it says so itself."""

import importlib
import sys
from pathlib import Path

import jax
import pytest

import optax_lowrank as ol

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
sys.path.insert(0, str(FOLDER))

INSTALLED = ["flax_nnx", "flax_linen", "equinox_module", "huggingface", "maxtext_patch"]
ELSEWHERE = {"tunix_peft": "tunix", "levanter_config": "levanter"}  # their packages


def test_every_recipe_has_a_test():
    assert {file.stem for file in FOLDER.glob("*.py")} == {*INSTALLED, *ELSEWHERE}


@pytest.mark.parametrize("name", INSTALLED)
def test_recipe(name, monkeypatch):
    # where a page names no fit; the exact one compiles soonest
    monkeypatch.setitem(ol.low_rank.__globals__, "randomized_svd", ol.svd)
    importlib.import_module(name).main()


@pytest.mark.filterwarnings("default")  # the frameworks have warnings of their own
@pytest.mark.parametrize("name", ELSEWHERE)
def test_recipe_of_a_framework_with_an_environment_of_its_own(name):
    pytest.importorskip(ELSEWHERE[name])
    with jax.numpy_rank_promotion("allow"):
        importlib.import_module(name).main()
