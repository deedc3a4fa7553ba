"""The machinery around notebooks: what is given from outside, what is taken out, and what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from experiments.notebook.stored import NotebookError, clean, complaints, main, with_parameters


def _notebook(*outputs: Any, source: str = "x") -> nbformat.NotebookNode:
    cell = new_code_cell(source, execution_count=1, outputs=list(outputs))
    notebook: nbformat.NotebookNode = new_notebook(cells=[cell])
    return notebook


def _printed(text: str, name: str = "stdout") -> Any:
    return new_output("stream", name=name, text=text)


def test_parameters_are_set_in_a_copy_and_comments_stay() -> None:
    cell = new_code_cell("SMALL = False  # little\nFOLDER = None", metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[cell])
    given = with_parameters(notebook, {"SMALL": True, "FOLDER": r"C:\new"})
    assert given.cells[0].source == "SMALL = True  # little\nFOLDER = 'C:\\\\new'"
    assert notebook.cells[0].source == "SMALL = False  # little\nFOLDER = None"
    with pytest.raises(NotebookError, match="does not set BIG"):
        with_parameters(notebook, {"BIG": 1})
    with pytest.raises(NotebookError, match="one cell tagged parameters, this one has 0"):
        with_parameters(new_notebook(), {"SMALL": True})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("kept in /" + "home/lily/runs", "a path of one machine"),
        ("<object at 0x7f3a2b4c5d6e>", "an object's address"),
        ("run 0f" + "a1" * 15, "an id or a digest"),
        ("\x1b[2K 12 %", "a terminal's escape codes"),
        ("began 2026-11-24 18:45", "a moment"),
    ],
)
def test_what_belongs_to_one_machine_or_moment_is_refused(text: str, what: str) -> None:
    (complaint,) = complaints(_notebook(_printed(text)))
    assert complaint.startswith(f"code cell 1 shows {what}: ")


def test_errors_warnings_and_cells_that_were_not_run_are_refused() -> None:
    failed = new_output("error", ename="ValueError", evalue="", traceback=[])
    assert complaints(_notebook(failed)) == ["code cell 1 ended in ValueError"]
    assert "wrote to stderr" in complaints(_notebook(_printed("careful", "stderr")))[0]
    silent = complaints(new_notebook(cells=[new_code_cell("x")]))
    assert silent == ["code cell 1 was not executed in its turn", "it holds no output"]
    assert "bytes; at most" in complaints(_notebook(_printed("x" * 700_000)))[0]
    assert complaints(_notebook(_printed("0.6127 bits per byte, see runs/mine and 1/2"))) == []


def test_cleaning_leaves_a_smaller_picture_of_the_same_size_and_a_plain_kernel() -> None:
    ramp = Image.effect_noise((200, 100), 80).convert("RGB")
    written = io.BytesIO()
    ramp.save(written, "PNG")
    picture = base64.b64encode(written.getvalue()).decode()
    shown = new_output("display_data", data={"image/png": picture, "text/plain": "<Figure>"})
    notebook = _notebook(shown)
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "now"}
    notebook.cells[0].execution_count = 7
    notebook.metadata["kernelspec"] = {"name": "mine", "display_name": "/" + "opt/mine"}
    clean(notebook)
    stored = notebook.cells[0].outputs[0].data["image/png"]
    assert len(stored) < 0.7 * len(picture)
    with Image.open(io.BytesIO(base64.b64decode(stored))) as image:
        assert (image.size, image.mode) == ((200, 100), "P")
    assert notebook.metadata.kernelspec.name == "python3"
    assert (notebook.cells[0].execution_count, dict(notebook.cells[0].metadata)) == (1, {})


def test_a_name_that_is_no_notebook_is_answered_with_what_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["05"]) == 2
    assert "01_train_a_story_model" in capsys.readouterr().err


def test_a_notebook_that_fails_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "07_fails.ipynb"
    nbformat.write(_notebook(_printed("old"), source="1 / 0"), path)
    before = path.read_bytes()
    monkeypatch.setattr("experiments.notebook.stored.NOTEBOOKS", tmp_path)
    assert main(["07"]) == 1
    assert path.read_bytes() == before
