"""Every notebook runs from top to bottom, and says what it was saved with."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def by_name(path: Path) -> str:
    return path.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_saved_with_its_outputs_and_without_complaints(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


# ipykernel and its event loop warn about each other, which is no concern of a reader.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_runs(path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:__main__")  # those of the cells themselves
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root), prepend=":")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(path.parent))
    complaints = [o for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert complaints == []
