"""Curves as a picture: what a model learned from each token, and what it learned in each minute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.plotting import COLORS, new_figure
from experiments.compare.frames import TRAIN, VAL
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
