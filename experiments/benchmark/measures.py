"""The definitions of all figures, as functions of rows and of nothing else.

They follow vLLM's `bench serve`. Of the requests that succeeded:

- TTFT: from when the request was due to the first message with tokens.
- ITL: from one message with tokens to the next, all gaps of all requests in one pool.
- TPOT: (last token − first token) / (tokens − 1), one value a request.
- generation time (vLLM's E2EL): from when it was due until the story was whole.
- throughput: their tokens, over the time from the first due request to the last end.
- goodput: requests within both limits (TTFT, TPOT), a second; and as a share of all requests.

"Due" is when the request was sent in a closed loop, and its scheduled time in the open loop. A figure without
observations is left out: it was not measured. Percentiles interpolate linearly.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.benchmark.memory import MemoryUse
from experiments.benchmark.sample import FailureKind, Phase, Sample

COUNTED: tuple[Phase, ...] = ("single", "concurrent", "open")
"""Phases whose requests make up the generation times and the success rate. Warm-up is excluded, a cold start has
a figure of its own, and the stress phase goes beyond what is promised on purpose."""
LATENCY_PHASES: tuple[Phase, ...] = ("open", "concurrent", "single")
"""TTFT, ITL, TPOT and goodput come from the first of these that was run."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and how many observations it stands on."""

    value: float
    n: int


Figures = dict[str, Figure]


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of at least one value lie, interpolated between neighbours."""
    return float(np.percentile(values, percent))


def wall_time(samples: Sequence[Sample]) -> float:
    """Seconds from the first due request to the last end; 0 for none."""
    if not samples:
        return 0.0
    return max(sample.ended for sample in samples) - min(sample.scheduled for sample in samples)


def is_good(sample: Sample, ttft_limit: float, itl_limit: float) -> bool:
    """Whether the story came whole, began in time, and flowed: its mean gap a token is within `itl_limit`.

    A story of no token begins when it ends, and one of a single token has no gap.
    """
    begun = sample.generation_time if sample.ttft is None else sample.ttft
    return sample.ok and begun <= ttft_limit and (sample.tpot or 0.0) <= itl_limit


def most_at_once(samples: Iterable[Sample]) -> int:
    """The largest number of successful stories that flowed at the same moment: first token come, end not yet."""
    changes = [
        change
        for sample in samples
        if sample.ok and sample.first is not None
        for change in ((sample.first, 1), (sample.ended, -1))
    ]
    most = now = 0
    for _, change in sorted(changes):  # at equal times an end comes first
        now += change
        most = max(most, now)
    return most


def failures(samples: Iterable[Sample]) -> dict[FailureKind, int]:
    """How many requests failed, by kind."""
    return dict(Counter(sample.error for sample in samples if sample.error is not None))


def phase_figures(samples: Sequence[Sample], *, ttft_limit: float, itl_limit: float) -> Figures:
    """All figures of one phase's (or level's) requests."""
    if not samples:
        return {}
    whole = [sample for sample in samples if sample.ok]
    seconds = wall_time(samples)
    good = sum(is_good(sample, ttft_limit, itl_limit) for sample in samples)
    count = len(samples)
    figures: Figures = {
        "requests": Figure(count, count),
        "success_rate": Figure(len(whole) / count, count),
        "error_rate": Figure(1 - len(whole) / count, count),
        "goodput_share": Figure(good / count, count),
        "streams_at_once": Figure(most_at_once(samples), count),
    }
    if seconds > 0:
        tokens = sum(sample.tokens for sample in whole)
        figures["goodput"] = Figure(good / seconds, count)
        figures["requests_per_second"] = Figure(len(whole) / seconds, count)
        figures["total_tokens_per_second"] = Figure(tokens / seconds, count)
    figures |= _generation_times(whole)
    figures |= _percentiles("ttft", [sample.ttft for sample in whole if sample.ttft is not None])
    figures |= _percentiles("itl", [gap for sample in whole for gap in sample.gaps])
    paces = [sample for sample in whole if sample.tpot is not None]
    figures |= _percentiles("tpot", [sample.tpot for sample in paces if sample.tpot is not None])
    if rate := _rate(paces):
        figures["tokens_per_second"] = Figure(rate, len(paces))
    return figures


def headline(
    samples: Sequence[Sample], *, ttft_limit: float, itl_limit: float, memory: MemoryUse | None
) -> Figures:
    """The figures that the report begins with and that thresholds name; each from the phase it is defined on.

    `tokens_per_second` is one stream's pace alone, `total_tokens_per_second` and `error_rate` are the concurrent
    phase's, `concurrent_handling` is the most stories that flowed at once where none failed.
    """

    def of(*phases: Phase) -> Figures:
        rows = [sample for sample in samples if sample.phase in phases]
        return phase_figures(rows, ttft_limit=ttft_limit, itl_limit=itl_limit)

    def some(figures: Figures, *names: str) -> Figures:
        return {name: figures[name] for name in names if name in figures}

    counted = of(*COUNTED)
    figures: Figures = {
        name: figures for name, figures in counted.items() if name.endswith("_generation_time")
    }
    figures |= some(counted, "success_rate", "requests")
    figures |= some(of("single"), "tokens_per_second")
    figures |= some(of("concurrent"), "total_tokens_per_second", "error_rate")
    if (phase := latency_phase(samples)) is not None:
        names = [f"{what}_p{percent}" for what in ("ttft", "itl", "tpot") for percent in (50, 95, 99)]
        figures |= some(of(phase), *names, "goodput", "goodput_share")
    loads = groups(samples, "concurrent", "stress")
    if loads:
        handled = [most_at_once(rows) for rows in loads.values() if all(row.ok for row in rows)]
        figures["concurrent_handling"] = Figure(max(handled, default=0), sum(map(len, loads.values())))
    cold = [row.ttft for row in samples if row.phase == "cold" and row.ok and row.ttft is not None]
    if cold:
        figures["cold_start_s"] = Figure(statistics.median(cold), len(cold))
    if memory is not None:
        figures["memory_percent"] = Figure(memory.memory_percent, memory.samples)
        figures["peak_rss_mb"] = Figure(memory.peak_rss_mb, memory.samples)
    return figures


def latency_phase(samples: Iterable[Sample]) -> Phase | None:
    """The phase that the headline's latencies come from."""
    run = {sample.phase for sample in samples}
    return next((phase for phase in LATENCY_PHASES if phase in run), None)


def groups(samples: Iterable[Sample], *phases: Phase) -> dict[tuple[Phase, int], list[Sample]]:
    """Rows by phase and number of open requests, in the order in which they were run."""
    found: dict[tuple[Phase, int], list[Sample]] = {}
    for sample in samples:
        if sample.phase in phases:
            found.setdefault((sample.phase, sample.level), []).append(sample)
    return found


def _generation_times(whole: Sequence[Sample]) -> Figures:
    times = [sample.generation_time for sample in whole]
    if not times:
        return {}
    values = {
        "avg": statistics.fmean(times), "median": statistics.median(times), "min": min(times), "max": max(times),
        "p95": percentile(times, 95), "p99": percentile(times, 99),
    }  # fmt: skip
    return {f"{name}_generation_time": Figure(value, len(times)) for name, value in values.items()}


def _percentiles(name: str, values: Sequence[float]) -> Figures:
    if not values:
        return {}
    return {
        f"{name}_p{percent}": Figure(percentile(values, percent), len(values)) for percent in (50, 95, 99)
    }


def _rate(paces: Sequence[Sample]) -> float:
    """Tokens a second while a story flows, its first token (which waits for the prompt) left out."""
    seconds = sum((sample.last or 0.0) - (sample.first or 0.0) for sample in paces)
    return sum(sample.tokens - 1 for sample in paces) / seconds if seconds > 0 else 0.0
