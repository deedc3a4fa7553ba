"""A comparison for whoever reads it: a table in the terminal, JSON for a machine, a folder of files to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.common.plotting import save
from experiments.compare.figures import draw_curves
from experiments.compare.frames import COLUMNS, METRICS, notes
from model.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

WIDEST = 40
"""Characters of a parameter's value that the terminal shows."""


def print_comparison(figures: DataFrame, unlike: DataFrame, console: Console) -> None:
    """Figures and differences, a column a subject; what nobody has is left out."""
    shown = Table("", *(str(name) for name in figures.index))
    for label, cells in cells_of(figures):
        shown.add_row(label, *cells)
    console.print(shown)
    if len(figures) > 1 and unlike.empty:
        console.print("No parameter differs.")
    elif not unlike.empty:
        apart = Table("differs", *(str(name) for name in unlike.columns))
        for name, row in unlike.iterrows():
            apart.add_row(str(name), *(_short(text) for text in row))
        console.print(apart)
    for note in notes(figures, unlike):
        console.print(f"Note: {note}.", soft_wrap=True)


def cells_of(figures: DataFrame) -> list[tuple[str, list[str]]]:
    """Each figure that some subject has, as its reader's name and one text a subject."""
    rows = []
    for column, (label, form) in COLUMNS.items():
        values = [_cell(value, form) for value in figures[column]]
        if any(values):
            rows.append((label, values))
    return rows


def as_plain(figures: DataFrame, unlike: DataFrame) -> dict[str, Any]:
    """Both frames as plain values; JSON has no NaN, so what is not known is null."""
    runs = [
        {"name": name, **{column: _plain(value) for column, value in row.items()}}
        for name, row in figures.to_dict("index").items()
    ]
    return {"runs": runs, "differences": unlike.to_dict("index"), "notes": notes(figures, unlike)}


def markdown(figures: DataFrame, unlike: DataFrame, pictures: Sequence[Path] = ()) -> str:
    """The same as a page, with its pictures beside it."""
    lines = ["# Comparison", "", *_page_table("", figures.index, cells_of(figures))]
    for path in pictures:
        lines += ["", f"![{path.stem.replace('_', ' ')}]({path.name})"]
    if not unlike.empty:
        rows = [(str(name), [str(text) for text in row]) for name, row in unlike.iterrows()]
        lines += ["", "## What differs", "", *_page_table("parameter", unlike.columns, rows)]
    lines += ["", *(f"Note: {note}." for note in notes(figures, unlike))]
    return "\n".join(lines).rstrip() + "\n"


def write_files(out: Path, figures: DataFrame, unlike: DataFrame, lines: DataFrame) -> list[Path]:
    """Write `compare.md`, `table.csv`, `differences.csv`, `curves.csv` and a PNG for each curve; returns the paths.

    Raises:
        InputError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        pictures = [
            save(draw_curves(lines, metric), out / f"{metric.replace('/', '_')}.png")
            for metric in METRICS
            if metric in set(lines["metric"])
        ]
        page = out / "compare.md"
        page.write_text(markdown(figures, unlike, pictures), encoding="utf-8")
        figures.to_csv(out / "table.csv")
        unlike.to_csv(out / "differences.csv")
        lines.to_csv(out / "curves.csv", index=False)
    except OSError as error:
        raise InputError("out", f"{out} cannot be written: {error.strerror}") from None
    return [page, *(out / f"{name}.csv" for name in ("table", "differences", "curves")), *pictures]


def _page_table(corner: str, columns: Sequence[Any], rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    head = [corner, *map(str, columns)]
    body = [[label, *cells] for label, cells in rows]
    lines = [head, ["---"] * len(head), *body]
    return [
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in lines
    ]


def _cell(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if form == "s" else format(value, form)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
