"""The definitions, on rows whose figures are worked out by hand, and against a second way of computing them."""

from __future__ import annotations

import statistics
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmark.measures import (
    Phase,
    Sample,
    failures,
    groups,
    headline,
    is_good,
    latency_phase,
    most_at_once,
    phase_figures,
    wall_time,
)
from tests.experiments.benchmark.made import failed, row

LIMITS = {"ttft_limit": 1.0, "itl_limit": 0.1}
TIMES = st.floats(min_value=0.0, max_value=1e6, allow_nan=False)


def values_of(samples: list[Sample], **limits: float) -> dict[str, float]:
    figures = phase_figures(samples, **{**LIMITS, **limits})
    return {name: figure.value for name, figure in figures.items()}


def test_two_stories_by_hand() -> None:
    # Due at 0: tokens at 0.5, 1.0, 2.0, whole at 2.5. Due at 1, sent late at 1.5: tokens at 2.0, 2.1, whole at 2.1.
    samples = [
        row(due=0.0, arrivals=(0.5, 1.0, 2.0), ended=2.5),
        row(due=1.0, started=1.5, arrivals=(2.0, 2.1), ended=2.1),
    ]
    output = values_of(samples, ttft_limit=0.75, itl_limit=0.8)
    assert output["requests"] == 2
    assert output["avg_generation_time"] == pytest.approx((2.5 + 1.1) / 2)
    assert output["median_generation_time"] == pytest.approx(1.8)
    assert (output["min_generation_time"], output["max_generation_time"]) == pytest.approx((1.1, 2.5))
    # Linear between two neighbours: 1.1 + 0.95 · 1.4 and 1.1 + 0.99 · 1.4.
    assert output["p95_generation_time"] == pytest.approx(2.43)
    assert output["p99_generation_time"] == pytest.approx(2.486)
    # From when they were due: 0.5 and 1.0, although the second was answered half a second after it was sent.
    assert output["ttft_p50"] == pytest.approx(0.75)
    # Gaps in one pool: 0.5, 1.0, 0.1.
    assert output["itl_p50"] == pytest.approx(0.5)
    assert output["itl_p95"] == pytest.approx(0.95)
    # (2.0 − 0.5) / 2 = 0.75 and 0.1 / 1.
    assert output["tpot_p50"] == pytest.approx((0.75 + 0.1) / 2)
    # Three tokens follow a first one, in 1.5 s and 0.1 s.
    assert output["tokens_per_second"] == pytest.approx(3 / 1.6)
    # Five tokens and two stories between 0 and 2.5; only the first story is within both limits.
    assert output["total_tokens_per_second"] == pytest.approx(2.0)
    assert output["requests_per_second"] == pytest.approx(0.8)
    assert output["goodput"] == pytest.approx(0.4)
    assert output["goodput_share"] == 0.5
    assert output["streams_at_once"] == 2


def test_tokens_are_counted_by_usage_and_gaps_by_message() -> None:
    # Three messages that bring ten tokens; a server that packs tokens has fewer gaps, not more tokens.
    packed = row(arrivals=(1.0, 2.0, 3.0), counts=[4, 4, 2], tokens=10, ended=3.0)
    output = values_of([packed])
    assert output["tokens_per_second"] == pytest.approx(9 / 2)
    assert output["tpot_p50"] == pytest.approx(2 / 9)
    assert (output["itl_p50"], output["total_tokens_per_second"]) == pytest.approx((1.0, 10 / 3))
    assert phase_figures([packed], **LIMITS)["itl_p50"].n == 2


def test_failed_requests_count_in_the_rates_and_in_no_time() -> None:
    samples = [row(), failed(error="busy"), failed(error="truncated"), failed(error="busy")]
    output = values_of(samples)
    assert (output["success_rate"], output["error_rate"], output["requests"]) == (0.25, 0.75, 4)
    assert output["max_generation_time"] == 2.0
    assert output["goodput_share"] == 0.0  # the one that came had a gap of 0.5 s a token
    assert failures(samples) == {"busy": 2, "truncated": 1}


def test_where_all_failed_there_is_no_time() -> None:
    output = values_of([failed(), failed(due=1.0)])
    assert (output["success_rate"], output["total_tokens_per_second"], output["streams_at_once"]) == (0, 0, 0)
    assert not [name for name in output if "generation" in name or name.startswith(("ttft", "itl", "tpot"))]
    assert phase_figures([], **LIMITS) == {}


def test_a_story_without_a_token_is_whole_but_has_no_first_token() -> None:
    empty = row(arrivals=(), ended=0.4)
    output = values_of([empty])
    assert (output["success_rate"], output["avg_generation_time"], output["goodput_share"]) == (1, 0.4, 1)
    assert "ttft_p50" not in output
    assert values_of([empty], ttft_limit=0.3)["goodput_share"] == 0


@pytest.mark.parametrize(
    ("spans", "most"),
    [
        ([(0, 1), (1, 2), (2, 3)], 1),  # one ends as the next begins
        ([(0, 3), (1, 2), (1.5, 4)], 3),
        ([(0, 10), (1, 2), (3, 4)], 2),
        ([], 0),
    ],
)
def test_stories_flow_at_once_from_their_first_token_to_their_end(spans: list[tuple[float, float]], most: int) -> None:
    # All were asked for at once; a server that writes them one after another still serves one at a time.
    assert most_at_once([row(arrivals=(begin,), ended=end) for begin, end in spans]) == most
    assert most_at_once([*[row(arrivals=(b,), ended=e) for b, e in spans], failed()]) == most


def test_each_headline_figure_comes_from_its_phase() -> None:
    samples = [
        *(row("cold", arrivals=(first,), ended=first) for first in (3.0, 9.0, 4.0)),
        row("warmup", ended=99.0),
        row("single", arrivals=(0.1, 0.2, 0.3), ended=0.3),
        row("concurrent", level=3, due=0.0, arrivals=(1.0, 2.0), ended=4.0),
        row("concurrent", level=3, due=0.0, arrivals=(1.5, 2.5), ended=4.0),
        failed("concurrent", level=3),
        row("stress", level=2, arrivals=(1.0, 50.0), ended=80.0),
        row("open", level=0, due=10.0, arrivals=(10.25, 10.5), ended=11.0),
    ]
    figures = headline(samples, **LIMITS)
    output = {name: figure.value for name, figure in figures.items()}
    assert output["cold_start_s"] == 4.0  # the median of three
    assert (output["requests"], output["success_rate"]) == (5, 0.8)  # single, concurrent, open
    assert output["max_generation_time"] == 4.0  # neither the warm-up's 99 s nor the stress phase's 80 s
    assert output["avg_generation_time"] == pytest.approx((0.3 + 4 + 4 + 1) / 4)
    assert output["error_rate"] == pytest.approx(1 / 3)
    assert output["tokens_per_second"] == pytest.approx(10.0)  # single
    assert output["total_tokens_per_second"] == pytest.approx(1.0)  # concurrent: 4 tokens in 4 s
    assert (output["ttft_p50"], output["itl_p50"], output["goodput_share"]) == (0.25, 0.25, 0)  # open
    assert output["concurrent_handling"] == 1  # one of the three that ran at once failed; the stress level was whole
    assert (figures["cold_start_s"].n, figures["error_rate"].n) == (3, 3)


def test_what_was_not_run_has_no_figure() -> None:
    output = headline([row("single")], **LIMITS)
    assert not output.keys() & {"error_rate", "concurrent_handling", "cold_start_s", "memory_percent"}
    assert "ttft_p50" in output  # of the single stream, where nothing else was run
    assert headline([], **LIMITS) == {}


def test_latencies_come_from_the_open_loop_where_there_was_one() -> None:
    rows = [row("single"), row("concurrent")]
    assert latency_phase([]) is None
    assert latency_phase(rows[:1]) == "single"
    assert latency_phase(rows) == "concurrent"
    assert latency_phase([*rows, row("open")]) == "open"


def test_groups_keep_the_order_in_which_they_were_run() -> None:
    rows = [row("stress", level=level, number=n) for level in (1, 4, 2) for n in (0, 1)]
    assert list(groups(rows, "stress")) == [("stress", 1), ("stress", 4), ("stress", 2)]
    assert [len(group) for group in groups(rows, "stress").values()] == [2, 2, 2]


@given(st.lists(TIMES, min_size=2, max_size=60))
def test_percentiles_agree_with_the_standard_library(values: list[float]) -> None:
    output = values_of([row(ended=value) for value in values])
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (95, 99):
        assert output[f"p{percent}_generation_time"] == pytest.approx(cuts[percent - 1], rel=1e-9, abs=1e-9)


@st.composite
def stories(draw: st.DrawFn) -> Sample:
    due = draw(st.floats(0, 100))
    gaps = draw(st.lists(st.floats(1e-4, 2.0), max_size=6))
    times = [due + sum(gaps[: count + 1]) for count in range(len(gaps))]
    ended = (times[-1] if times else due) + draw(st.floats(1e-4, 1.0))
    error = draw(st.sampled_from([None, None, None, "truncated"]))
    return row(draw(st.sampled_from(get_args(Phase))), due=due, arrivals=tuple(times), ended=ended, error=error)


@given(st.lists(stories(), min_size=1, max_size=12), st.floats(1e-3, 3), st.floats(1e-3, 3))
def test_goodput_counts_by_hand_and_never_exceeds_success(
    samples: list[Sample], ttft_limit: float, itl_limit: float
) -> None:
    output = values_of(samples, ttft_limit=ttft_limit, itl_limit=itl_limit)
    good = 0
    for sample in samples:
        first = sample.arrivals[0] if sample.arrivals else sample.ended
        pace = (sample.arrivals[-1] - first) / max(1, len(sample.arrivals) - 1) if sample.arrivals else 0.0
        good += sample.error is None and first - sample.scheduled <= ttft_limit and pace <= itl_limit
    assert output["goodput_share"] == pytest.approx(good / len(samples))
    assert output["goodput"] == pytest.approx(good / wall_time(samples))
    assert output["goodput_share"] <= output["success_rate"]
    wider = values_of(samples, ttft_limit=2 * ttft_limit, itl_limit=2 * itl_limit)
    assert wider["goodput_share"] >= output["goodput_share"]


@given(st.lists(stories(), min_size=1, max_size=12))
def test_figures_do_not_depend_on_the_order_of_the_rows(samples: list[Sample]) -> None:
    assert values_of(samples) == pytest.approx(values_of(samples[::-1]))
    assert [is_good(sample, 1.0, 0.1) for sample in samples].count(True) <= len(samples)
