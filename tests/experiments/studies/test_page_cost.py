"""What visits cost is for the log; that each turn has the visits it names, and whole stories, is for a test."""

from __future__ import annotations

import math

import pytest

from experiments.studies.page_cost import PAUSES, measure
from experiments.studies.rounds import quantile
from tests.experiments.dashboard.made import made


@pytest.mark.slow
def test_each_turn_has_the_visits_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made().uri)
    rows = measure(seconds=2.5, rounds=1)
    assert [row["visits"] for row in rows] == list(PAUSES)
    alone, seldom, often = rows
    assert alone["count"] == 0
    assert math.isnan(alone["visit_p50_ms"])
    assert 1 <= seldom["count"] <= 3 < often["count"]
    for row in rows:
        assert row["stories"] >= 1
        assert row["ttft_p50_ms"] <= row["ttft_p95_ms"]
        assert row["gap_p50_ms"] <= row["gap_p99_ms"]
    assert alone["ttft_p50_ms_ratio"] == alone["gap_p99_ms_ratio"] == 1


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert math.isnan(quantile([], 0.5))
