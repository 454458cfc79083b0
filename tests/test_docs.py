"""Every example in a docstring and in the README runs and shows what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_lowrank

MODULES = [
    module.name.removeprefix("optax_lowrank.")
    for module in pkgutil.walk_packages(optax_lowrank.__path__, "optax_lowrank.")
]
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"optax_lowrank.{name}")
    names = {"jnp": jnp, "optax": optax, "ol": optax_lowrank}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_every_public_function_has_an_example():
    public = [getattr(optax_lowrank, n) for n in dir(optax_lowrank) if not n.startswith("_")]
    functions = [f for f in public if callable(f) and not isinstance(f, type)]
    assert len(functions) > 30
    assert [f.__name__ for f in functions if "Example" not in (f.__doc__ or "")] == []


def test_readme():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    for block in blocks:
        if block.startswith(">>>"):
            shown = doctest.DocTestParser().get_doctest(block, scope, "README", None, None)
            assert doctest.DocTestRunner().run(shown).failed == 0
        elif "manager" not in block:  # a checkpoint manager is the reader's
            with jax.numpy_rank_promotion("allow"):
                exec(block, scope)
