"""A comparison as pictures of its curves, in the terminal, as JSON, and as a folder of files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from experiments.common.tables import COLORS, Table, new_figure, save
from experiments.compare.frames import COLUMNS, METRICS, TRAIN, VAL, notes
from model.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SIZE = (9.0, 3.8)
POINTS = 150
"""Of a drawn line at most: a longer curve is averaged over equal numbers of its steps."""
BEGINNING = 0.05
"""Share of a run whose values do not decide how far the picture reaches up: every run falls from the same height."""
TITLES = {VAL: ("Validation", "bits per byte"), TRAIN: ("Training loss", "nats per token, mean over steps")}


def draw_curves(frame: DataFrame, metric: str = VAL) -> Figure:
    """One line a subject over tokens and, beside it, over minutes; `frame` is that of `curves`.

    Raises `InputError`: `frame` has no point of this metric.
    """
    from matplotlib.ticker import EngFormatter

    rows = frame[(frame["metric"] == metric) & np.isfinite(frame["value"])]
    if rows.empty:
        raise InputError("metric", f"must be one that these runs have logged, got {metric!r}")
    title, unit = TITLES.get(metric, (metric, metric))
    figure, (by_tokens, by_time) = new_figure(*SIZE, columns=2, sharey=True)
    tops = []
    for place, (name, line) in enumerate(rows.groupby("name", sort=False)):
        shown = thinned(line)
        style: dict[str, Any] = {
            "color": COLORS[place % len(COLORS)],
            "linestyle": "-" if place < len(COLORS) else "--",
            "marker": "o" if len(shown) <= 40 else None,
            "markersize": 3,
            "label": name,
        }
        by_tokens.plot(shown["tokens"], shown["value"], **style)
        by_time.plot(shown["minutes"], shown["value"], **style)
        tops.append(shown["value"].iloc[int(BEGINNING * len(shown)) :].max())
    low, high = float(rows["value"].min()), max(tops)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    by_tokens.set_ylim(low - margin, high + margin)
    by_tokens.set(title=f"{title}, by tokens", xlabel="tokens", ylabel=unit)
    by_tokens.xaxis.set_major_formatter(EngFormatter())
    by_time.set(title=f"{title}, by time", xlabel="minutes of the run")
    for axes in (by_tokens, by_time):
        axes.set_xlim(left=0)
    by_time.legend(frameon=False)
    return figure


def thinned(line: DataFrame, points: int = POINTS) -> DataFrame:
    """A curve of at most `points` points, each the mean of equally many neighbours, in the order of the steps."""
    line = line.sort_values("step")
    if len(line) <= points:
        return line
    group = np.arange(len(line)) * points // len(line)
    return line[["step", "tokens", "minutes", "value"]].groupby(group).mean()


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
