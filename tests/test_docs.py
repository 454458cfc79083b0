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
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        if "manager" not in block:  # a checkpoint manager is the reader's
            with jax.numpy_rank_promotion("allow"):
                exec(block, scope)
    lines = re.findall(r"^\| [^|]*\| `((?:ol|optax)\.[^`…]*)` \|", README, re.MULTILINE)
    assert len(lines) == 8
    for line in lines:
        made = eval(line, scope, {"params": {"kernel": jnp.ones((64, 64))}})
        assert hasattr(made, "init") or jax.tree.leaves(made), line


def test_readme_can_be_read_in_minutes():
    assert len(README.split()) <= 1200
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
