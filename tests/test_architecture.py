"""The order of the house: bayes_lora < models < inference, and what a module may look like."""

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {  # folder -> the name it is imported by
    "bayes_lora": "bayes_lora",
    "models": "bayes_lora.models",
    "inference": "bayes_lora.inference",
}
# What a folder must not import. The bare folder names are never right.
ABOVE = ["tests", "benchmarks", "notebooks", "models", "inference"]
FORBIDDEN = {
    "bayes_lora": [*ABOVE, "bayes_lora.models", "bayes_lora.inference"],
    "models": [*ABOVE, "bayes_lora.inference"],
    "inference": ABOVE,
}
# The one exception: `bayes_lora.load`, imported when it is asked for.
FRONT_DOOR = {"bayes_lora/__init__.py": ["bayes_lora.inference.loading.load"] * 2}
# Inside bayes_lora, a module imports from its own level and the ones before.
LEVELS = [
    ["calibration", "errors", "row_sample"],
    [
        *("distributions", "gated_normal", "gates", "next_tokens", "point_mass"),
        *("quantization", "targets"),
    ],
    ["flat_weights", "packing", "ranges"],
    ["factors", "layers"],
    ["network"],
    ["costs", "decided"],
    ["__init__"],
]
LONGEST = 300  # lines

# A script runs with its own folder first on the path, where a file of such a name would be
# imported instead of the library. Besides these, whatever is installed here counts.
LIBRARIES = {"arviz", "datasets", "evaluate", "peft", "pyro", "tokenizers", "torch", "transformers"}


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def show(path):
    return path.relative_to(ROOT).as_posix()


def imports(tree, package):
    """Full names of all that a module imports, wherever in the file; package is the module's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_within(name, package):
    return name == package or name.startswith(f"{package}.")


def wrong_imports(tree, folder):
    return [
        name
        for name in imports(tree, PACKAGES[folder])
        if any(is_within(name, package) for package in FORBIDDEN[folder])
    ]


def pyro_primitives(tree):
    """Imports of Pyro other than its distributions, and names taken from a bare `pyro`."""
    names = [name for name in imports(tree, "bayes_lora") if is_within(name, "pyro")]
    names += [
        f"pyro.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pyro"
    ]
    return [name for name in names if not is_within(name, "pyro.distributions")]


def level_of(module):
    return next((i for i, names in enumerate(LEVELS) if module in names), None)


@pytest.mark.parametrize("folder", PACKAGES)
def test_dependencies_go_one_way(folder):
    found = {
        show(path): wrong_imports(ast.parse(path.read_text()), folder) for path in files(folder)
    }
    assert found, "no modules found"
    allowed = {path: names for path, names in FRONT_DOOR.items() if path in found}
    assert {path: names for path, names in found.items() if names} == allowed


@pytest.mark.parametrize("path", files("bayes_lora"), ids=show)
def test_the_parts_know_no_pyro_primitives(path):
    assert pyro_primitives(ast.parse(path.read_text())) == []


def test_arviz_is_imported_in_one_file():
    found = [
        show(path)
        for path in files(*PACKAGES)
        if any(is_within(name, "arviz") for name in imports(ast.parse(path.read_text()), ""))
    ]
    assert found == ["inference/bundle.py"]


@pytest.mark.parametrize("path", files("bayes_lora"), ids=show)
def test_inside_bayes_lora_levels_go_one_way(path):
    own = level_of(path.stem)
    assert own is not None, f"give {path.stem} a level in LEVELS"
    for name in imports(ast.parse(path.read_text()), "bayes_lora"):
        parts = name.split(".")
        imported = level_of(parts[1]) if parts[0] == "bayes_lora" and len(parts) > 1 else None
        assert imported is None or imported <= own, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", files(*PACKAGES, "benchmarks", "notebooks"), ids=show)
def test_no_file_is_named_like_a_library(path):
    taken = LIBRARIES | set(sys.stdlib_module_names) | set(metadata.packages_distributions())
    assert path.stem not in taken


@pytest.mark.parametrize("path", files(*PACKAGES, "benchmarks"), ids=show)
def test_a_module_is_short_and_says_what_it_is(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("bayes_lora", "import bayes_lora.models"),
        ("bayes_lora", "from bayes_lora import inference"),
        ("bayes_lora", "from . import models"),
        ("bayes_lora", "from .models.priors import weak"),
        ("bayes_lora", "def late():\n    from bayes_lora.models import priors"),
        ("models", "from bayes_lora.inference.svi import fit"),
        ("models", "from ..inference import svi"),
        ("inference", "import models"),
    ],
)
def test_the_check_sees_a_wrong_import(folder, line):
    assert wrong_imports(ast.parse(line), folder)


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("import pyro", False),
        ("from pyro import sample", False),
        ("import pyro.distributions\npyro.sample('z', d)", False),
        ("from pyro.infer import SVI", False),
        ("import pyro.distributions as dist\ndist.Normal(0, 1)", True),
        ("from pyro import distributions", True),
        ("from pyro.distributions.torch_distribution import TorchDistribution", True),
    ],
)
def test_the_check_sees_a_pyro_primitive(line, allowed):
    assert (pyro_primitives(ast.parse(line)) == []) == allowed
