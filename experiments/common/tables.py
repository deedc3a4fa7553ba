"""One way to write a table: for the terminal, and as Markdown. Cells are shown literally, never read as markup."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

LONGEST_FIGURE = 20
"""Characters of a cell that stays on one line in a narrow terminal; a longer one may be broken between words."""


def terminal_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    text: Collection[str] = (),
    styles: Mapping[str, str] | None = None,
) -> Table:
    """A table without a frame: the first column and those named in `text` align left, all others right.

    `styles` maps a cell's whole text to a style of `rich`.
    """
    from rich.table import Table
    from rich.text import Text

    cells = [tuple(row) for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        left = number == 0 or column in text
        width = max(map(_least_width, (column, *(row[number] for row in cells))))
        table.add_column(Text(column), justify="left" if left else "right", min_width=width)
    for row in cells:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    return table


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text: Collection[str] = ()) -> list[str]:
    """The lines of a table in Markdown, aligned as in the terminal."""
    rule = ["---" if number == 0 or name in text else "---:" for number, name in enumerate(columns)]
    return [f"| {' | '.join(map(markdown_text, row))} |" for row in (columns, rule, *rows)]


def markdown_text(text: str) -> str:
    """Text on one line that neither ends a table's cell nor opens an HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _least_width(cell: str) -> int:
    return len(cell) if len(cell) <= LONGEST_FIGURE else max(map(len, cell.split()))
