"""A comparison in the terminal, as JSON, and as a folder of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments.common.plotting import save
from experiments.common.tables import Table
from experiments.compare.figures import draw_curves
from experiments.compare.frames import COLUMNS, METRICS, notes
from model.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

WIDEST = 40
"""Characters of a parameter's value that the terminal shows."""


def print_comparison(figures: DataFrame, unlike: DataFrame, console: Console) -> None:
    """Print figures and differences, one column a subject."""
    console.print(figures_table(figures))
    if not unlike.empty:
        console.print()
        console.print(_differences(unlike, "differs", WIDEST))
    elif len(figures) > 1:
        console.print("No parameter differs.")
    for note in notes(figures, unlike):
        console.print(f"Note: {note}.", soft_wrap=True)


def figures_table(figures: DataFrame) -> Table:
    """Each figure that some subject has: its label, and one column a subject."""
    rows = []
    for column, (label, form) in COLUMNS.items():
        known = figures[column].notna()
        if known.any():
            cells = zip(figures[column], known, strict=True)
            rows.append([label, *(format(value, form) if there else "" for value, there in cells)])
    return Table(["", *map(str, figures.index)], rows)


def as_plain(figures: DataFrame, unlike: DataFrame) -> dict[str, Any]:
    """Both frames as plain values; JSON has no NaN, so an unknown value is null."""
    finite = figures.replace([math.inf, -math.inf], math.nan).astype(object)
    return {
        "runs": finite.where(finite.notna(), None).reset_index().to_dict("records"),
        "differences": unlike.to_dict("index"),
        "notes": notes(figures, unlike),
    }


def markdown(figures: DataFrame, unlike: DataFrame, pictures: Sequence[Path] = ()) -> str:
    """The comparison as a page that shows its pictures."""
    lines = ["# Comparison", "", *figures_table(figures).markdown()]
    for path in pictures:
        lines += ["", f"![{path.stem.replace('_', ' ')}]({path.name})"]
    if not unlike.empty:
        lines += ["", "## What differs", "", *_differences(unlike, "parameter").markdown()]
    lines += ["", *(f"Note: {note}." for note in notes(figures, unlike))]
    return "\n".join(lines).rstrip() + "\n"


def _differences(unlike: DataFrame, title: str, widest: int | None = None) -> Table:
    def cell(text: str) -> str:
        return text if widest is None or len(text) <= widest else text[: widest - 1] + "…"

    rows = [[str(name), *map(cell, row)] for name, row in unlike.iterrows()]
    return Table([title, *map(str, unlike.columns)], rows)


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
