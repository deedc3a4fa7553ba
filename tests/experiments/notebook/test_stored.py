"""Stored outputs: what is removed, and what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from experiments.notebook.stored import main, normalise
from tests.experiments.notebook.problems import problems


def _notebook(*outputs: Any, source: str = "x") -> nbformat.NotebookNode:
    cell = new_code_cell(source, execution_count=1, outputs=list(outputs))
    notebook: nbformat.NotebookNode = new_notebook(cells=[cell])
    return notebook


def _printed(text: str, name: str = "stdout") -> Any:
    return new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kept in /" + "home/lily/runs", "a path of one machine"),
        ("<object at 0x7f3a2b4c5d6e>", "an object's address"),
        ("run 0f" + "a1" * 15, "an id or a digest"),
        ("\x1b[2K 12 %", "a terminal's escape codes"),
        ("began 2026-11-24 18:45", "a time"),
    ],
)
def test_outputs_of_one_machine_or_time_are_refused(text: str, what: str) -> None:
    (problem,) = problems(_notebook(_printed(text)))
    assert problem.startswith(f"code cell 1 shows {what}: ")


def test_errors_warnings_and_cells_that_were_not_run_are_refused() -> None:
    failed = new_output("error", ename="ValueError", evalue="", traceback=[])
    assert problems(_notebook(failed)) == ["code cell 1 ended in ValueError"]
    assert "wrote to stderr" in problems(_notebook(_printed("careful", "stderr")))[0]
    silent = problems(new_notebook(cells=[new_code_cell("x")]))
    assert silent == ["code cell 1 was not executed in order", "it holds no output"]
    assert "bytes; at most" in problems(_notebook(_printed("x" * 700_000)))[0]
    assert problems(_notebook(_printed("0.6127 bits per byte, see runs/mine and 1/2"))) == []


def test_normalising_leaves_a_smaller_picture_of_the_same_size_and_a_plain_kernel() -> None:
    ramp = Image.effect_noise((200, 100), 80).convert("RGB")
    written = io.BytesIO()
    ramp.save(written, "PNG")
    picture = base64.b64encode(written.getvalue()).decode()
    shown = new_output("display_data", data={"image/png": picture, "text/plain": "<Figure>"})
    notebook = _notebook(shown)
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "now"}
    notebook.cells[0].execution_count = 7
    notebook.metadata["kernelspec"] = {"name": "mine", "display_name": "/" + "opt/mine"}
    normalise(notebook)
    stored = notebook.cells[0].outputs[0].data["image/png"]
    assert len(stored) < 0.7 * len(picture)
    with Image.open(io.BytesIO(base64.b64decode(stored))) as image:
        assert (image.size, image.mode) == ((200, 100), "P")
    assert notebook.metadata.kernelspec.name == "python3"
    assert (notebook.cells[0].execution_count, dict(notebook.cells[0].metadata)) == (1, {})


def test_a_notebook_is_normalised_in_its_file(tmp_path: Path) -> None:
    notebook = _notebook(_printed("fine"))
    notebook.cells[0].execution_count = 3
    nbformat.write(notebook, tmp_path / "one.ipynb")
    main([str(tmp_path / "one.ipynb")])
    assert nbformat.read(tmp_path / "one.ipynb", as_version=4).cells[0].execution_count == 1
