"""What limits and memory cost is for the log; that all targets wrote the same stories is for a test."""

from __future__ import annotations

import pytest

from experiments.studies.guard_cost import measure
from tests.redis_server import redis_server


@pytest.mark.slow
def test_all_copies_take_turns_at_the_same_stories() -> None:
    with redis_server():  # where it is missing, one target would be left out
        rows = measure([1, 3], stories=4, rounds=1)
    names = ["plain", "guarded", "guarded, redis", "told again"]
    assert [(row.target, row.readers) for row in rows] == [
        (name, readers) for readers in (1, 3) for name in names
    ]
    for row in rows:
        assert row.stories == 4
        assert row.ttft > 0
        assert row.tokens_per_second > 0
    plain, again = rows[0], rows[3]
    assert plain.ttft_ratio == plain.rate_ratio == 1
    assert again.processor_per_story < plain.processor_per_story, "nothing was written"
