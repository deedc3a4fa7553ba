"""What limits and cache cost is for the log; that all targets served the same stories is for a test."""

from __future__ import annotations

import pytest

from experiments.studies.limits_cost import measure
from tests.redis_server import redis_server


@pytest.mark.slow
def test_all_copies_take_turns_at_the_same_stories() -> None:
    with redis_server():  # where it is missing, one target would be left out
        rows = measure([1, 3], stories=4, rounds=1)
    names = ["plain", "limits and cache", "limits and cache, Redis", "cached"]
    found = [(row["target"], row["clients"]) for row in rows]
    assert found == [(name, clients) for clients in (1, 3) for name in names]
    for row in rows:
        assert row["stories"] == 4
        assert row["ttft_ms"] > 0
        assert row["tokens_per_second"] > 0
    plain, cached = rows[0], rows[3]
    assert plain["ttft_ms_ratio"] == plain["tokens_per_second_ratio"] == 1
    assert cached["cpu_ms_per_story"] < plain["cpu_ms_per_story"], "nothing was generated"
