"""Pictures of a run: how latencies are distributed, how throughput grows with the load, when each stream ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.benchmark.measures import Sample, groups, latency_phase, phase_figures
from experiments.common.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (7.0, 4.2)
BINS = 40
PHASE_COLORS = {"single": BLUE, "concurrent": ORANGE, "stress": PURPLE, "open": GREEN}
MOST_STREAMS = 120
"""Rows of the timeline; more are not distinguishable in a picture."""

Draw = Callable[["Axes", Sequence[Sample]], None]


def draw_figures(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Draw every picture for which there are rows; returns the files, PNG."""
    own = [sample for sample in samples if sample.target == "target" and sample.phase in PHASE_COLORS]
    phase = latency_phase(own)
    latency = [sample for sample in own if sample.phase == phase and sample.ok]
    pictures: dict[str, tuple[Draw, list[Sample]]] = {
        "latency_cdf": (_latency_cdf, [sample for sample in own if sample.phase != "stress" and sample.ok]),
        "ttft_histogram": (_ttft_histogram, [sample for sample in latency if sample.ttft is not None]),
        "itl_histogram": (_itl_histogram, [sample for sample in latency if sample.gaps]),
        "throughput": (_throughput, [sample for sample in own if sample.phase == "stress"]),
        "timeline": (_timeline, [sample for sample in own if sample.phase == phase != "single"]),
    }
    paths = []
    for name, (draw, rows) in pictures.items():
        if rows:
            figure, (axes,) = new_figure(*SIZE)
            draw(axes, rows)
            paths.append(save(figure, folder / f"{name}.png"))
    return paths


def _latency_cdf(axes: Axes, rows: Sequence[Sample]) -> None:
    for (phase, _), group in groups(rows, "single", "concurrent", "open").items():
        label = f"{phase} (n = {len(group)})"
        axes.ecdf([sample.generation_time for sample in group], label=label, color=PHASE_COLORS[phase])
    axes.set(title="Generation time", xlabel="seconds", ylabel="share of requests")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _ttft_histogram(axes: Axes, rows: Sequence[Sample]) -> None:
    _histogram(axes, rows, "Time to first token", [sample.ttft for sample in rows if sample.ttft is not None])
    axes.set_ylabel("requests")


def _itl_histogram(axes: Axes, rows: Sequence[Sample]) -> None:
    _histogram(axes, rows, "Time between tokens", [gap for sample in rows for gap in sample.gaps])
    axes.set_yscale("log")
    axes.set_ylabel("gaps (log)")


def _histogram(axes: Axes, rows: Sequence[Sample], what: str, seconds: list[float]) -> None:
    axes.hist([1e3 * value for value in seconds], bins=BINS, color=PHASE_COLORS[rows[0].phase])
    axes.set(title=f"{what} ({rows[0].phase}, n = {len(seconds):,})", xlabel="milliseconds")


def _throughput(axes: Axes, rows: Sequence[Sample]) -> None:
    levels, rates = [], []
    for (_, level), group in groups(rows, "stress").items():
        figures = phase_figures(group, ttft_limit=1.0, itl_limit=1.0)
        if "total_tokens_per_second" in figures:
            levels.append(level)
            rates.append(figures["total_tokens_per_second"].value)
    axes.plot(levels, rates, marker="o", color=PHASE_COLORS["stress"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set_ylim(bottom=0)
    axes.set(title="Throughput against concurrency", xlabel="requests open at once", ylabel="tokens/s in total")


def _timeline(axes: Axes, rows: Sequence[Sample]) -> None:
    """One bar a request: grey while it waits, coloured while it streams, red where it failed."""
    begin = min(sample.scheduled for sample in rows)
    for place, sample in enumerate(rows[:MOST_STREAMS]):
        first = sample.ended if sample.first is None else sample.first
        axes.barh(place, first - sample.scheduled, left=sample.scheduled - begin, color=GREY)
        # A failed request without a token would have no length and not be visible.
        length = max(sample.ended - first, 0.0 if sample.ok else 0.01)
        axes.barh(place, length, left=first - begin, color=PHASE_COLORS[sample.phase] if sample.ok else RED)
    axes.invert_yaxis()
    axes.set(title=f"Streams ({rows[0].phase})", xlabel="seconds", ylabel="request")
