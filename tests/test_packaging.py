"""What is installed: one package, `bayes_lora`, made of three folders, and one command."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {  # where it is in the repository -> where it is in the wheel
    "bayes_lora": "bayes_lora",
    "models": "bayes_lora/models",
    "inference": "bayes_lora/inference",
}
MOVED = ["models", "inference"]
COMMAND = "bayes-lora = bayes_lora.inference.cli:main"


def run_python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of the sources: building leaves litter beside them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    done = run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def dist_info(archive, name):
    (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
    return archive.read(path).decode()


def test_the_only_top_level_name_is_bayes_lora(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bayes_lora"}
    assert dist_info(wheel, "top_level.txt").split() == ["bayes_lora"]


@pytest.mark.parametrize(("folder", "installed"), FOLDERS.items())
def test_the_wheel_holds_every_module_of_the_folder(wheel, folder, installed):
    modules = {path.name for path in (ROOT / folder).glob("*.py")}
    assert "__init__.py" in modules
    assert {f"{installed}/{name}" for name in modules} <= set(wheel.namelist())


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_modules_is_listed_in_pyproject(folder):
    nested = list((ROOT / folder).glob("*/**/*.py"))
    assert nested == [], "list the new package in pyproject.toml, and here"


def test_the_wheel_is_typed_licensed_and_has_the_command(wheel):
    assert "bayes_lora/py.typed" in wheel.namelist()
    assert COMMAND in dist_info(wheel, "entry_points.txt").splitlines()
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")
    described = Parser().parsestr(dist_info(wheel, "METADATA"))
    assert described["Name"] == "bayes-lora"
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.11"


def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    tmp_path = tmp_path.resolve()
    wheel.extractall(tmp_path)
    program = (
        "import bayes_lora, bayes_lora.models, bayes_lora.inference as last;"
        "print(bayes_lora.__file__); print(bayes_lora.models.__file__); print(last.__file__)"
    )
    done = run_python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [tmp_path / place / "__init__.py" for place in FOLDERS.values()]
    assert [Path(line) for line in done.stdout.split()] == expected


@pytest.mark.parametrize("name", MOVED)
def test_the_installed_package_is_the_folder(name):
    module = importlib.import_module(f"bayes_lora.{name}")
    assert Path(module.__file__) == ROOT / name / "__init__.py"


@pytest.mark.parametrize("name", MOVED)
def test_a_folder_imported_by_its_own_name_says_the_right_one(name):
    done = run_python("-c", f"import {name}", cwd=ROOT)  # with -c, Python looks in cwd first
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert last_line == (
        f"ImportError: import this package as bayes_lora.{name} (pip install -e .)"
    )


def test_the_version_is_the_same_everywhere():
    import bayes_lora

    assert bayes_lora.__version__ == metadata.version("bayes-lora")
