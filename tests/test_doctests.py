"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import bayes_lora

MODULES = [m.name for m in pkgutil.walk_packages(bayes_lora.__path__, "bayes_lora.")]
for package in ("models", "inference"):
    path = importlib.import_module(f"bayes_lora.{package}").__path__
    MODULES += [m.name for m in pkgutil.iter_modules(path, f"bayes_lora.{package}.")]


def test_modules_of_all_three_folders_are_found():
    assert {"bayes_lora.gates", "bayes_lora.models.model", "bayes_lora.inference.train"} <= set(
        MODULES
    )


@pytest.mark.parametrize("name", sorted(set(MODULES)))
def test_examples_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
