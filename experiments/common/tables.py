"""One way to write a table, for the terminal and as Markdown, and the figures in it; one style of plots.

Cells are shown literally, never read as markup. Plots have one palette and plain axes, and equal ones give equal PNG
files. They are made without pyplot, so they leave no global state and need no display; a notebook shows what a function
returns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table as RichTable

GAP = 2
"""Spaces between two columns."""
ABSENT = "-"
"""Stands for what was not measured."""
LONGEST_FIGURE = 20
"""Characters of a cell that stays on one line in a narrow terminal; a longer one may be broken between words."""


@dataclass(frozen=True)
class Table:
    """A table without a frame: the first column and those named in `text` align left, all others right.

    Columns that do not fit into the terminal's width continue below, beside the first `key` columns again.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    text: Collection[str] = ()
    styles: Mapping[str, str] = field(default_factory=dict)
    """A cell's whole text → a style of `rich`."""
    key: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [
            max(map(_least_width, (column, *(row[number] for row in self.rows))))
            for number, column in enumerate(self.columns)
        ]
        stop = self.key
        while True:
            start, width = stop, sum(widths[: self.key]) + GAP * (self.key - 1)
            while stop < len(widths) and (stop == start or width + GAP + widths[stop] <= options.max_width):
                width, stop = width + GAP + widths[stop], stop + 1
            # Where not even one column fits beside the key, names are broken instead.
            least = widths if width <= options.max_width else [1] * len(widths)
            yield self._part([*range(self.key), *range(start, stop)], least, self.title if start == self.key else None)
            if stop == len(widths):
                return
            yield ""

    def _part(self, shown: Sequence[int], widths: Sequence[int], title: str | None) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number in shown:
            left = number == 0 or self.columns[number] in self.text
            table.add_column(
                Text(self.columns[number]),
                justify="left" if left else "right",
                min_width=widths[number],
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(row[number], style=self.styles.get(row[number], "")) for number in shown))
        return table

    def markdown(self) -> list[str]:
        """The lines of the table in Markdown, without its title, aligned as in the terminal."""
        rule = ["---" if number == 0 or name in self.text else "---:" for number, name in enumerate(self.columns)]
        return [f"| {' | '.join(map(markdown_text, row))} |" for row in (self.columns, rule, *self.rows)]


def shown(value: float | None, form: str = ".4g", unit: str = "") -> str:
    """A figure in a format of Python's, with its unit behind; `ABSENT` for None."""
    return ABSENT if value is None else f"{value:{form}}{unit}"


def shown_interval(estimate: Estimate, form: str = ".4f") -> str:
    """A value with its interval: `0.6127 [0.6101, 0.6153]`."""
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def rounded(value: float) -> str:
    """A figure of any size: three digits or more, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2g}"


def markdown_text(text: str) -> str:
    """Text on one line that neither ends a table's cell nor opens an HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _least_width(cell: str) -> int:
    return len(cell) if len(cell) <= LONGEST_FIGURE else max(map(len, cell.split()))


DPI = 110
BLUE, ORANGE, GREEN, RED, PURPLE = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
"""In this order for series that are shown side by side."""
GREY = "#d0d0d0"


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `width` x `height` inches and its axes, row by row, without the upper and right spines.

    `options` are those of matplotlib's `Figure.subplots`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(rows, columns, **options)).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; equal figures give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
