"""Notebooks as files: executed from top to bottom, cleaned, checked, and stored with what they showed.

`python -m experiments.notebook.stored [NAME…]` does it to those in `notebooks/` and writes them back; `make
notebooks` does it to all. A code host shows the stored outputs, so they hold nothing of the machine that made them.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.notebook.place import ROOT
from model.errors import StoryError

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = "parameters"
"""Tag of the one cell whose values may be given from outside, as papermill calls it too."""
SECONDS = 1800
"""That one cell may take."""
SHADES = 256
"""Colours of a stored picture: plots need few, and the file is half the size."""
LARGEST = 600_000
"""Bytes of a stored notebook; a code host gives up on much larger ones."""
FOREIGN = {
    "a path of one machine": re.compile(
        r"(?<![\w.~:/-])/(?:home|tmp|root|work|Users|private|mnt|var)/[\w.-]+"
    ),
    "a terminal's escape codes": re.compile("\x1b\\["),
    "an object's address": re.compile(r"\b0x[0-9a-f]{6,}"),
    "an id or a digest": re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{32,}\b"),
    "a moment": re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"),
}
"""What a stored output must not hold."""


class NotebookError(StoryError):
    """A notebook does not run, or what it shows cannot be stored."""

    exit_code = 1


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, valid."""
    import nbformat

    notebook: NotebookNode = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def with_parameters(notebook: NotebookNode, values: Mapping[str, object]) -> NotebookNode:
    """A copy whose parameters cell sets `values` instead of its own; a name that it does not have is an error.

    Raises:
        NotebookError: there is not exactly one such cell, or it lacks a name.
    """
    import copy

    changed = copy.deepcopy(notebook)
    cells = [cell for cell in changed.cells if PARAMETERS in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"a notebook must have one cell tagged {PARAMETERS}, this one has {len(cells)}")
    for name, value in values.items():
        # A replacement's backslashes have a meaning of their own.
        line = f"{name} = {value!r}".replace("\\", "\\\\")
        setting = rf"^{name} = [^#\n]*?(?= *#|$)"
        cells[0].source, found = re.subn(setting, line, cells[0].source, flags=re.MULTILINE)
        if not found:
            raise NotebookError(f"the parameters cell does not set {name}")
    return changed


@contextmanager
def own_kernel() -> Iterator[Any]:
    """A manager of a kernel that is started on first use and ended with the block.

    It talks through files in a folder of its own: no port, and nobody else's kernel in the same place.
    """
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync

    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        manager = AsyncKernelManager(transport="ipc", ip=f"{folder}/ipc")
        try:
            yield manager
        finally:
            if manager.has_kernel:
                run_sync(manager.shutdown_kernel)(now=True)


def execute(notebook: NotebookNode, kernel: Any) -> NotebookNode:
    """Run all cells, in place, in `kernel` (of `own_kernel`), which forgets first what it ran before.

    Raises:
        NotebookError: a cell failed; the message holds its source and its error.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    client = NotebookClient(notebook, km=kernel, timeout=SECONDS, startup_timeout=300, record_timing=False)
    try:
        with client.setup_kernel(cleanup_kc=False):
            assert client.kc is not None
            try:
                client.kc.execute("%reset -f", silent=True)
                for number, cell in enumerate(notebook.cells):
                    client.execute_cell(cell, number)
            finally:
                client.kc.stop_channels()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(str(error)) from None
    return notebook


def clean(notebook: NotebookNode) -> None:
    """Take out, in place, what differs from machine to machine and from time to time; make pictures small."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "data" in output and "image/png" in output.data:
                output.data["image/png"] = _smaller(output.data["image/png"])


def complaints(notebook: NotebookNode) -> list[str]:
    """Why this notebook cannot be stored as it is; empty: it can."""
    import nbformat

    told = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        if cell.execution_count != number:
            told.append(f"code cell {number} was not executed in its turn")
        for output in cell.outputs:
            if output.output_type == "error":
                told.append(f"code cell {number} ended in {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                told.append(f"code cell {number} wrote to stderr: {output.text[:80]!r}")
            for text in _texts(output):
                told += [
                    f"code cell {number} shows {what}: {found[0]}"
                    for what, pattern in FOREIGN.items()
                    if (found := pattern.search(text))
                ]
    if not any(cell.outputs for cell in code):
        told.append("it holds no output")
    if (size := len(nbformat.writes(notebook).encode())) > LARGEST:
        told.append(f"it is {size:,} bytes; at most {LARGEST:,} are allowed")
    return told


def refresh(path: Path) -> None:
    """Execute the notebook at `path` as it stands and write it back.

    Raises:
        NotebookError: a cell failed, or an output cannot be stored; the file is then as it was.
    """
    import nbformat

    with own_kernel() as kernel:
        notebook = execute(read(path), kernel)
    clean(notebook)
    if wrong := complaints(notebook):
        raise NotebookError(f"{path.name}: {'; '.join(wrong)}")
    nbformat.write(notebook, path)


def _texts(output: NotebookNode) -> Iterator[str]:
    if output.output_type == "stream":
        yield output.text
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield content


def _smaller(picture: str) -> str:
    """The same PNG (base64) in `SHADES` colours."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        flat = image.convert("RGBA")
        page = Image.new("RGBA", flat.size, "white")
        page.alpha_composite(flat)
        few = page.convert("RGB").quantize(SHADES, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(names: list[str]) -> int:
    """Refresh the notebooks called `names` (`02` is enough of one), or all; returns the exit code."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            print(
                f"{name} is no notebook; there are {', '.join(path.stem for path in paths)}", file=sys.stderr
            )
            return 2
    for path in paths:
        if not names or any(path.name.startswith(name) for name in names):
            print(f"executing {path.name}", flush=True)
            try:
                refresh(path)
            except NotebookError as error:
                print(f"notebooks: {error}", file=sys.stderr)
                return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
