"""The run as pictures: how latencies are spread, how throughput grows with the load, what flowed when.

Drawn without a display, straight into files, and from the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmark.measures import groups, latency_phase, phase_figures
from experiments.benchmark.sample import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (7.0, 4.2)
BINS = 40
DPI = 110
PHASE_COLORS = {"single": "#4c72b0", "concurrent": "#dd8452", "stress": "#8172b3", "open": "#55a868"}
FAILED = "#c44e52"
WAITING = "#d0d0d0"
MOST_STREAMS = 120
"""Rows of the timeline; more cannot be told apart in a picture."""

Draw = Callable[["Axes", Sequence[Sample]], None]


def draw_figures(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Draw every picture that the rows have something for; returns the files, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    own = [sample for sample in samples if sample.target == "target" and sample.phase != "compare"]
    paths = []
    for name, (draw, rows) in _pictures(own).items():
        if not rows:
            continue
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, rows)
        path = folder / f"{name}.png"
        # Nothing of this machine or moment, so that equal rows give equal files.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        paths.append(path)
    return paths


def _pictures(samples: Sequence[Sample]) -> dict[str, tuple[Draw, list[Sample]]]:
    flowing = [sample for sample in samples if sample.phase in PHASE_COLORS]
    phase = latency_phase(samples)
    latency = [sample for sample in samples if sample.phase == phase and sample.ok]
    return {
        "latency_cdf": (_latency_cdf, [s for s in flowing if s.phase != "stress" and s.ok]),
        "ttft_histogram": (_ttft_histogram, [s for s in latency if s.ttft is not None]),
        "itl_histogram": (_itl_histogram, [s for s in latency if s.gaps]),
        "throughput": (_throughput, [s for s in flowing if s.phase == "stress"]),
        "timeline": (_timeline, [s for s in flowing if s.phase in ("open", "concurrent")]),
    }


def _latency_cdf(axes: Axes, rows: Sequence[Sample]) -> None:
    import numpy as np

    for (phase, _), group in groups(rows, "single", "concurrent", "open").items():
        times = np.sort([sample.generation_time for sample in group])
        shares = np.arange(1, len(times) + 1) / len(times)
        axes.step(times, shares, where="post", label=f"{phase} (n = {len(times)})", color=PHASE_COLORS[phase])
    axes.set(title="Time until the story is whole", xlabel="seconds", ylabel="share of requests")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)


def _ttft_histogram(axes: Axes, rows: Sequence[Sample]) -> None:
    times = [1e3 * sample.ttft for sample in rows if sample.ttft is not None]
    axes.hist(times, bins=BINS, color=PHASE_COLORS[rows[0].phase])
    title = f"Time to first token ({rows[0].phase}, n = {len(times)})"
    axes.set(title=title, xlabel="milliseconds", ylabel="requests")


def _itl_histogram(axes: Axes, rows: Sequence[Sample]) -> None:
    gaps = [1e3 * gap for sample in rows for gap in sample.gaps]
    axes.hist(gaps, bins=BINS, color=PHASE_COLORS[rows[0].phase])
    axes.set_yscale("log")
    title = f"Time between tokens ({rows[0].phase}, n = {len(gaps):,})"
    axes.set(title=title, xlabel="milliseconds", ylabel="gaps (log)")


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
    axes.set(
        title="Throughput against concurrency", xlabel="requests open at once", ylabel="tokens/s in total"
    )


def _timeline(axes: Axes, rows: Sequence[Sample]) -> None:
    """A line a request of the latency phase: grey while it waits, coloured while it flows, red where it failed."""
    phase = latency_phase(rows)
    shown = [sample for sample in rows if sample.phase == phase][:MOST_STREAMS]
    begin = min(sample.scheduled for sample in shown)
    styles: dict[str, Any] = {"height": 0.8}
    for place, sample in enumerate(shown):
        first = sample.ended if sample.first is None else sample.first
        axes.barh(place, first - sample.scheduled, left=sample.scheduled - begin, color=WAITING, **styles)
        color = PHASE_COLORS[sample.phase] if sample.ok else FAILED
        # A failed request without a token would have no length at all, and would not be seen.
        length = max(sample.ended - first, 0.0 if sample.ok else 0.01)
        axes.barh(place, length, left=first - begin, color=color, **styles)
    axes.invert_yaxis()
    axes.set(title=f"Streams ({phase})", xlabel="seconds", ylabel="request")
