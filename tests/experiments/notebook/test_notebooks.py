"""The four notebooks: what is stored can be read, and every cell runs, from top to bottom, in a small way.

One kernel runs all four, emptied in between: what they import is then loaded once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.notebook.place import empty_store
from experiments.notebook.stored import (
    NOTEBOOKS,
    clean,
    complaints,
    execute,
    own_kernel,
    read,
    with_parameters,
)
from tests.training.conftest import _migrated_store

__all__ = ["_migrated_store"]

NAMES = (
    "01_train_a_story_model",
    "02_compare_experiments",
    "03_benchmark_and_gate",
    "04_inside_the_model",
)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    with own_kernel() as manager:
        yield manager


@pytest.fixture(scope="module")
def folder(_migrated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them work, with an empty store."""
    home = tmp_path_factory.mktemp("notebooks")
    shutil.copy(_migrated_store, home / empty_store())
    return home


def test_these_are_all() -> None:
    assert tuple(path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_shows_its_results_and_nothing_of_a_machine(name: str) -> None:
    notebook = read(NOTEBOOKS / f"{name}.ipynb")
    assert complaints(notebook) == []
    assert notebook.cells[0].cell_type == "markdown", "prose first"
    assert any(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name: str, kernel: Any, folder: Path) -> None:
    notebook = with_parameters(read(NOTEBOOKS / f"{name}.ipynb"), {"SMALL": True, "FOLDER": str(folder)})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    execute(notebook, kernel)
    clean(notebook)
    assert complaints(notebook) == []
