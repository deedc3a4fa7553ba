"""A comparison in the terminal, as JSON, and as a folder of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.common.plotting import save
from experiments.common.tables import markdown_table, terminal_table
from experiments.compare.figures import draw_curves
from experiments.compare.frames import COLUMNS, METRICS, notes
from model.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

WIDEST = 40
"""Characters of a parameter's value that the terminal shows."""


def print_comparison(figures: DataFrame, unlike: DataFrame, console: Console) -> None:
    """Print figures and differences, one column a subject."""
    console.print(terminal_table(["", *map(str, figures.index)], cells_of(figures)))
    if len(figures) > 1 and unlike.empty:
        console.print("No parameter differs.")
    elif not unlike.empty:
        rows = [[str(name), *map(_short, row)] for name, row in unlike.iterrows()]
        console.print()
        console.print(terminal_table(["differs", *map(str, unlike.columns)], rows))
    for note in notes(figures, unlike):
        console.print(f"Note: {note}.", soft_wrap=True)


def cells_of(figures: DataFrame) -> list[list[str]]:
    """Each figure that some subject has: its label, and one text a subject."""
    rows = []
    for column, (label, form) in COLUMNS.items():
        values = [_cell(value, form) for value in figures[column]]
        if any(values):
            rows.append([label, *values])
    return rows


def as_plain(figures: DataFrame, unlike: DataFrame) -> dict[str, Any]:
    """Both frames as plain values; JSON has no NaN, so an unknown value is null."""
    runs = [
        {"name": name, **{column: _plain(value) for column, value in row.items()}}
        for name, row in figures.to_dict("index").items()
    ]
    return {"runs": runs, "differences": unlike.to_dict("index"), "notes": notes(figures, unlike)}


def markdown(figures: DataFrame, unlike: DataFrame, pictures: Sequence[Path] = ()) -> str:
    """The comparison as a page that shows its pictures."""
    lines = ["# Comparison", "", *markdown_table(["", *map(str, figures.index)], cells_of(figures))]
    for path in pictures:
        lines += ["", f"![{path.stem.replace('_', ' ')}]({path.name})"]
    if not unlike.empty:
        rows = [[str(name), *map(str, row)] for name, row in unlike.iterrows()]
        columns = ["parameter", *map(str, unlike.columns)]
        lines += ["", "## What differs", "", *markdown_table(columns, rows)]
    lines += ["", *(f"Note: {note}." for note in notes(figures, unlike))]
    return "\n".join(lines).rstrip() + "\n"


def write_files(out: Path, figures: DataFrame, unlike: DataFrame, lines: DataFrame) -> list[Path]:
    """Write `compare.md`, `table.csv`, `differences.csv`, `curves.csv` and a PNG for each curve; returns the paths.

    Raises `InputError`: `out` cannot be written.
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


def _cell(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if form == "s" else format(value, form)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
