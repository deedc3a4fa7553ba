"""What keeps an executed notebook out of the repository: a code host shows its outputs to everybody."""

from __future__ import annotations

import re
from collections.abc import Iterator

import nbformat
from nbformat import NotebookNode

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
