"""Strip and check the outputs of executed notebooks, so that they can be stored in the repository.

`jupyter execute --inplace FILE…` runs notebooks, and `python -m experiments.notebook.stored FILE…` makes their outputs
the same on every machine; `make notebooks` does both. A code host shows stored outputs, so they must hold nothing of
the machine that made them.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from PIL import Image

COLORS = 256
"""Of a stored picture: plots need few, and the file is half the size."""
LARGEST = 600_000
"""Bytes of a stored notebook; a code host does not show much larger ones."""
FOREIGN = {
    "a path of one machine": re.compile(r"(?<![\w.~:/-])/(?:home|tmp|root|work|Users|private|mnt|var)/[\w.-]+"),
    "a terminal's escape codes": re.compile("\x1b\\["),
    "an object's address": re.compile(r"\b0x[0-9a-f]{6,}"),
    "an id or a digest": re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{32,}\b"),
    "a time": re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"),
}
"""What a stored output must not hold."""


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


def problems(notebook: NotebookNode) -> list[str]:
    """Return why this notebook cannot be stored as it is; empty: it can."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        if cell.execution_count != number:
            found.append(f"code cell {number} was not executed in order")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} ended in {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"code cell {number} wrote to stderr: {output.text[:80]!r}")
            for text in _texts(output):
                found += [
                    f"code cell {number} shows {what}: {match[0]}"
                    for what, pattern in FOREIGN.items()
                    if (match := pattern.search(text))
                ]
    if not any(cell.outputs for cell in code):
        found.append("it holds no output")
    if (size := len(nbformat.writes(notebook).encode())) > LARGEST:
        found.append(f"it is {size:,} bytes; at most {LARGEST:,} are allowed")
    return found


def _texts(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "stream":
        yield output.text
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield content


def _smaller(picture: str) -> str:
    """Return the same PNG (base64) in `COLORS` colours."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        flat = image.convert("RGBA")
        page = Image.new("RGBA", flat.size, "white")
        page.alpha_composite(flat)
        few = page.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(files: list[str]) -> int:
    """Normalise the notebooks `files`; return 1 where one cannot be stored, which is then left as it was."""
    code = 0
    for path in map(Path, files):
        notebook: NotebookNode = nbformat.read(path, as_version=4)
        normalise(notebook)
        if found := problems(notebook):
            print(f"{path}: {'; '.join(found)}", file=sys.stderr)
            code = 1
        else:
            nbformat.write(notebook, path)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
