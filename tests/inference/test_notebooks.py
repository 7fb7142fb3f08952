"""Every notebook is listed, short, holds its outputs, and runs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MOST_CELLS = 25


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_list_is_the_folder():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) >= 3
    assert [name for name in NOTEBOOKS if f"]({name})" not in page] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_short_and_holds_its_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = code_of(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    assert len(notebook.cells) <= MOST_CELLS
    assert not any(line.startswith("def ") for cell in code for line in cell.source.splitlines())
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_on_a_tiny_model(name, small_run):
    notebook = read(name)
    (parameters,) = [c for c in code_of(notebook) if "parameters" in c.metadata.get("tags", ())]
    options = small_run | {"batch_size": 40}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    parameters.source = f"""options = {words}
from bayes_lora.inference import posterior
posterior.POSTERIOR_DRAWS, posterior.PRIOR_DRAWS = 10, 10"""
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
