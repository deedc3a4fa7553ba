"""Make the outputs of executed notebooks the same on every machine, so that they can be stored in the repository.

`jupyter execute --inplace FILE…` runs notebooks and `python -m experiments.notebook.stored FILE…` normalises them;
`make notebooks` does both. That they hold nothing of the machine that made them is checked by the tests.
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image

COLORS = 256
"""Of a stored picture: plots need few, and the file is half the size."""


def normalise(notebook: NotebookNode) -> None:
    """Remove in place what differs between machines and runs, and make pictures small."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])


def _smaller(picture: str) -> str:
    """Return the same PNG (base64) in `COLORS` colours."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        few = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(files: list[str]) -> None:
    """Normalise the notebooks `files` in place."""
    for path in map(Path, files):
        notebook: NotebookNode = nbformat.read(path, as_version=4)
        normalise(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
