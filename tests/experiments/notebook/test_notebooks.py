"""The four notebooks: the stored outputs can be read, and every cell runs from top to bottom on small data."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from experiments.notebook.stored import normalise
from experiments.notebook.workspace import ROOT, empty_store
from tests.experiments.notebook.problems import problems
from tests.training.conftest import _migrated_store

__all__ = ["_migrated_store"]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def folder(_migrated_store: Path, tmp_path: Path) -> Path:
    """Where the notebooks work, with an empty store."""
    shutil.copy(_migrated_store, tmp_path / empty_store())
    return tmp_path


def test_these_are_all() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_train_a_story_model",
        "02_compare_experiments",
        "03_benchmark_and_gate",
        "04_inside_the_model",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_shows_its_results_and_nothing_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert notebook.cells[0].cell_type == "markdown", "prose first"
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))


def test_the_notebooks_run_from_top_to_bottom(folder: Path) -> None:
    """In one kernel, emptied in between: what they import is loaded once."""
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    cells = []
    for notebook in notebooks:
        for cell in notebook.cells:
            cells.append(cell)
            if "parameters" in cell.metadata.get("tags", []):
                cells.append(new_code_cell(f"SMALL = True\nFOLDER = {str(folder)!r}"))
        cells.append(new_code_cell("%reset -f"))
    NotebookClient(new_notebook(cells=cells), timeout=600).execute()
    for notebook in notebooks:
        normalise(notebook)
        assert problems(notebook) == []
