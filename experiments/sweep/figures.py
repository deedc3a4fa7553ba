"""Pictures of a sweep: how the best value fell from trial to trial, and which fields made the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, ACCENT, FAINT = "#333333", "#b5552b", "#9a9a9a"


def draw_history(rows: list[dict[str, Any]], path: Path) -> None:
    """Each trial's value over its number, pruned ones hollow at where they were left, and the best so far as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    complete = [(row["number"], row["value"]) for row in rows if row["state"] == "complete"]
    pruned = [(row["number"], row["value"]) for row in rows if row["state"] == "pruned" and row["value"]]
    if pruned:
        axes.scatter(
            *zip(*pruned, strict=True), facecolors="none", edgecolors=FAINT, label="pruned, when it was left"
        )
    if complete:
        numbers, values = zip(*complete, strict=True)
        axes.scatter(numbers, values, color=INK, label="complete", zorder=3)
        best = [min(values[: index + 1]) for index in range(len(values))]
        axes.step(numbers, best, where="post", color=ACCENT, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("validation bits per byte")
    if complete or pruned:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def draw_importance(shares: dict[str, float], path: Path) -> None:
    """A bar a field, the largest on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.35 * len(shares)), layout="constrained")
    axes = figure.subplots()
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=ACCENT)
    axes.set_xlabel("share in the differences between complete trials")
    figure.savefig(path, dpi=120)
