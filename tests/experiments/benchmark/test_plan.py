"""What is asked: checked at the edge, never the same twice, the same again for the same seed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.benchmark.plan import CHOICES, Plan
from model.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "requests must be greater than or equal to 1, got 0"),
        ({"concurrency": 513}, "concurrency must be less than or equal to 512, got 513"),
        ({"max_tokens": 0}, "max_tokens must be greater than or equal to 1, got 0"),
        ({"rate": 0.0}, "rate must be greater than 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be a finite number, got nan"),
        ({"phases": ("single", "warmup")}, "phases must be 'cold', .* or 'compare', got 'warmup'"),
        ({"phases": ()}, r"phases must have at least 1 item.*, got \(\)"),
        ({"phase": "single"}, "phase is not known.*"),
    ],
)
def test_bad_use_names_the_option_and_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Plan(**options)


def test_no_two_requests_of_a_run_are_the_same_and_a_seed_repeats_them() -> None:
    places = [(phase, number, level) for phase in CHOICES for level in (1, 2, 8) for number in range(100)]
    asked = [Plan().request(*place) for place in places]
    assert len({request.sampling.seed for request in asked}) == len(places)
    assert asked == [Plan().request(*place) for place in places]
    other = [Plan(seed=1).request(*place) for place in places]
    assert not {request.sampling.seed for request in asked} & {request.sampling.seed for request in other}


def test_a_duration_alone_sets_no_number_of_requests() -> None:
    assert (Plan().limit, Plan(duration=5.0).limit) == (30, None)
    assert (Plan(requests=7).limit, Plan(requests=7, duration=5.0).limit) == (7, 7)


@pytest.mark.parametrize(("concurrency", "levels"), [(1, (1, 2, 4)), (3, (1, 2, 4, 8, 12)), (4, (1, 2, 4, 8, 16))])
def test_the_stress_phase_doubles_up_to_four_times_the_concurrency(concurrency: int, levels: tuple[int, ...]) -> None:
    assert Plan(concurrency=concurrency).levels == levels


def test_a_plan_is_plain_values() -> None:
    output = json.loads(json.dumps(Plan(requests=3).as_dict()))
    assert (output["requests"], output["phases"]) == (3, ["cold", "single", "concurrent", "stress", "open"])
