"""Figures of what happens inside the network, one idea each, with units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.common.tables import COLORS, DPI, new_figure
from experiments.interpret.trace import StoryTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

RECURRENCE_SHADES = ("#1f3b6e", "#4c72b0", "#85a3d1", "#bccbe6")
"""One for each recurrent layer, the first the darkest."""
TEXT_COLUMNS = 88
"""Letters in a line of a coloured text."""
WORD_TOKENS = 32
"""Tokens of one word at most."""
LINE_INCHES, LETTER_INCHES = 0.235, 9 / DPI
"""Whole pixels a letter: a renderer rounds them, and a long word would be wider than its background."""
LETTER_POINTS = LETTER_INCHES * 72 / 0.602
"""A letter of DejaVu Sans Mono is 0.602 of its size wide."""
TITLE_INCHES, SCALE_INCHES = 0.34, 0.5


def draw_half_lives(trace: StoryTrace) -> Figure:
    """Draw every head's half-life in tokens: at the story's mean rate, and over the middle 80 % of its tokens."""
    figure, (axes,) = new_figure(7.5, 3.6)
    width = 0.0
    for index, (number, weights) in enumerate(sorted(trace.recurrences.items())):
        middle = weights.half_life().numpy()
        rates_TH = -weights.keep_TH.log().numpy()
        fast, slow = (np.log(2) / np.quantile(rates_TH, share, axis=0) for share in (0.9, 0.1))
        order = np.argsort(middle)
        columns = width + np.arange(len(middle))
        color = RECURRENCE_SHADES[index % len(RECURRENCE_SHADES)]
        axes.vlines(columns, fast[order], slow[order], color=color, linewidth=2)
        axes.plot(columns, middle[order], "o", color=color, label=f"layer {number + 1}")
        width += len(middle) + 1
    axes.axhline(len(trace.tokens), color="#8c8c8c", linewidth=1, linestyle=":")
    axes.annotate(
        "this\nstory",
        (1, len(trace.tokens)),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        color="#606060",
        va="center",
    )
    axes.set_yscale("log")
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.set_xticks([])
    axes.set(
        title="How long each head of a recurrence remembers",
        xlabel="heads of each recurrent layer, from quick to slow",
        ylabel="half-life of its memory, tokens",
    )
    axes.legend(frameon=False, ncols=len(trace.recurrences), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


def draw_text(
    texts: Sequence[str],
    values: npt.ArrayLike,
    *,
    title: str,
    scale: str,
    highest: float | None = None,
    marked: int | None = None,
    formatted: str = "{:.2g}",
) -> Figure:
    """Draw a story as text, with a background as dark as each token's value; NaN has none.

    Args:
        texts: of the tokens, including spaces and line breaks.
        values: one a token, at least 0.
        scale: what the values are, with their unit.
        highest: the value of the darkest background; None: the largest value.
        marked: a token that gets a frame.
        formatted: format of the scale's two ends.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = np.asarray(values, np.float64)
    top = float(np.nanmax(shown)) if highest is None else highest
    shades = colormaps["Blues"]
    boxes, lines = _lay_out(texts)
    width, height = TEXT_COLUMNS * LETTER_INCHES, lines * LINE_INCHES + TITLE_INCHES + SCALE_INCHES
    figure, (axes,) = new_figure(width, height)
    figure.set_layout_engine("none")
    axes.set_position((0, SCALE_INCHES / height, 1, lines * LINE_INCHES / height))
    axes.set_axis_off()
    axes.set_xlim(0, TEXT_COLUMNS)
    axes.set_ylim(lines, 0)
    figure.text(0.5 * LETTER_INCHES / width, 1 - 0.22 / height, title, fontsize=10.5, fontweight="bold")
    for token, column, line, text in boxes:
        # The darkest shades would hide the letters, so only the lighter two thirds are used.
        share = shown[token] / top if np.isfinite(shown[token]) and top > 0 else 0.0
        background = shades(0.68 * min(1.0, max(0.0, share))) if share > 0.01 else (1, 1, 1, 0)
        frame: Any = COLORS[3] if token == marked else "none"
        axes.add_patch(
            Rectangle((column, line + 0.06), len(text), 0.9, facecolor=background, edgecolor=frame, linewidth=1.2)
        )
        axes.text(column, line + 0.76, text, family="DejaVu Sans Mono", fontsize=LETTER_POINTS, parse_math=False)
    bar = figure.add_axes((0.5 * LETTER_INCHES / width, 0.2 / height, 1.6 / width, 0.11 / height))
    bar.imshow(np.linspace(0, 0.68, 64)[None], aspect="auto", cmap=shades, vmin=0, vmax=1)
    bar.set_axis_off()
    ends = f"{formatted.format(0)} to {formatted.format(top)}{'' if highest is None else ' or more'}: {scale}"
    figure.text((0.5 * LETTER_INCHES + 1.7) / width, 0.2 / height, ends, fontsize=8.5)
    return figure


def draw_attention(trace: StoryTrace, *, count: int = 100) -> Figure:
    """Draw the weights of every attention layer and head between the first `count` tokens."""
    layers = sorted(trace.attentions.items())
    heads = layers[0][1].weight_HTT.size(0)
    figure, panels = new_figure(
        2.2 * heads + 0.8, 2.35 * len(layers) + 0.5, rows=len(layers), columns=heads, sharex=True, sharey=True
    )
    for row, (number, weights) in enumerate(layers):
        for head in range(heads):
            axes = panels[row * heads + head]
            # Square roots: a weight of 0.01 stays visible beside one of 1.
            shown = np.sqrt(weights.weight_HTT[head, :count, :count].numpy())
            image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"layer {number + 1}, head {head + 1}", fontsize=9)
            axes.tick_params(labelsize=8)
    figure.supxlabel("token that is looked at", fontsize=9)
    figure.supylabel("token that looks", fontsize=9)
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30, pad=0.01)
    bar.set_ticks([weight**0.5 for weight in (0, 0.01, 0.1, 0.5, 1)], labels=["0", "0.01", "0.1", "0.5", "1"])
    bar.set_label("attention weight", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_reach(costs: DataFrame) -> Figure:
    """Draw what stories cost with one kind of layer limited; `costs` are those of `cost_by_reach`."""
    figure, (axes,) = new_figure(7.0, 3.8)
    whole = costs[costs["cut"] == "none"].iloc[0]
    axes.axhline(whole["mean"], color="#8c8c8c", linewidth=1, linestyle=":", label="the whole network")
    names = {"attention": "attention limited", "recurrence": "recurrences limited"}
    for index, (cut, name) in enumerate(names.items(), 1):
        line = costs[costs["cut"] == cut]
        _draw_intervals(axes, line["reach"], line, COLORS[index], name)
    axes.set_xscale("log", base=2)
    reaches = sorted(set(costs["reach"]) - {0})
    axes.set_xticks(reaches, [str(reach) for reach in reaches])
    axes.set(title="How far back a layer must read", ylabel="bits per byte (95 % interval)")
    axes.set_xlabel("tokens that it may read, its own included")
    axes.legend(frameon=False)
    return figure


def draw_mentions(means: DataFrame) -> Figure:
    """Draw what a name costs by mention; `means` are those of `by_mention`."""
    figure, (axes,) = new_figure(7.0, 4.0)
    most = int(means["mention"].max())
    for index, (label, line) in enumerate(means.groupby("network", sort=False)):
        _draw_intervals(axes, line["mention"] + 0.05 * (index - 1.5), line, COLORS[index], str(label))
    names = ["first", "second", "third", "fourth", "fifth", "sixth"]
    axes.set_xticks(range(1, most + 1), [*names[: most - 1], f"{names[most - 1]} or later"])
    axes.set_ylim(bottom=0)
    axes.set(title="What a name costs", xlabel="mention in the story", ylabel="nats per name (95 % interval)")
    axes.legend(frameon=False)
    return figure


def _draw_intervals(axes: Axes, x: Series[Any], line: DataFrame, color: str, label: str) -> None:
    """Draw means with their intervals: the columns `mean`, `low` and `high`."""
    errors = [line["mean"] - line["low"], line["high"] - line["mean"]]
    axes.errorbar(x, line["mean"], errors, marker="o", markersize=4, capsize=2, color=color, label=label)


def _lay_out(texts: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """Return (token, column, line, text) of each box, and the number of lines; words are not broken."""
    boxes: list[tuple[int, int, int, str]] = []
    column = line = 0
    for token, whole in enumerate(texts):
        for number, text in enumerate(whole.split("\n")):
            if number:
                column, line = 0, line + 1
            # The tokens that follow belong to the same word, up to the next space or line break.
            rest = re.split("[ \n]", "".join(texts[token + 1 : token + WORD_TOKENS]))[0]
            if column and column + len(text) + len(rest) > TEXT_COLUMNS and text.startswith(" "):
                column, line = 0, line + 1
            if column == 0:
                text = text.lstrip(" ")
            if text:
                boxes.append((token, column, line, text))
                column += len(text)
    return boxes, line + 1
