"""Closed loops, open loops and comparisons against targets whose behaviour is known exactly, in virtual time.

The targets are scripted: what is tested is when requests are sent and what their rows say, not a model.
What is asked is checked at the edge, never the same twice, and the same again for the same seed.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmark.load import CHOICES, Clock, LoadGenerator, Plan, arrival_times
from experiments.benchmark.measures import Listener, Sample, phase_figures
from experiments.benchmark.report import Comparison, summarise
from experiments.benchmark.targets import Ending, Failed
from model.errors import InputError
from model.generation import GenerationRequest
from tests import virtual_time
from tests.experiments.benchmark.made import failed, row
from tests.experiments.benchmark.paced import Paced


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


@dataclass
class Scripted:
    """Serves one story at a time, each in `service` seconds; stalls once, for `stall` seconds from `stalls_at`."""

    service: float = 0.01
    stalls_at: float | None = None
    stall: float = 0.0
    fail: Exception | None = None
    seen: list[int] = field(default_factory=list)
    open: int = 0
    most: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _clock: Clock | None = None

    async def generate(self, request: GenerationRequest, listener: Listener, *, cold: bool = False) -> Ending:
        self._clock = self._clock or Clock()
        self.seen.append(request.sampling.seed)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            if self.fail is not None:
                raise self.fail
            async with self._turn:
                now = self._clock.now()
                if self.stalls_at is not None and now >= self.stalls_at:
                    self.stalls_at = None
                    await asyncio.sleep(self.stall)
                await asyncio.sleep(self.service)
                listener.arrived(1)
                listener.complete()
                return Ending("stop", 1)
        finally:
            self.open -= 1


def p95(samples: list[Sample]) -> float:
    return phase_figures(samples, ttft_limit=1, itl_limit=1)["p95_generation_time"].value


def closed(target: Scripted, plan: Plan, clients: int) -> list[Sample]:
    return virtual_time.run(LoadGenerator(plan).closed_loop(target, "concurrent", clients))  # type: ignore[arg-type]


def opened(target: Scripted, plan: Plan) -> list[Sample]:
    return virtual_time.run(LoadGenerator(plan).open_loop(target))  # type: ignore[arg-type]


def test_an_open_loop_shows_a_stall_that_a_closed_loop_hides() -> None:
    """Coordinated omission: one closed-loop client sends nothing while it waits, the clients of the world do.

    Sixty stories of 10 ms with one stall of 0.8 s. In the closed loop one request in sixty meets it; at 40
    requests a second half of them come while it lasts or while the queue behind it is served.
    """
    stall = 0.8
    hidden = closed(Scripted(stalls_at=0.1, stall=stall), Plan(requests=60), clients=1)
    shown = opened(Scripted(stalls_at=0.1, stall=stall), Plan(requests=60, rate=40.0))
    assert max(sample.generation_time for sample in hidden) > stall  # it is there, once
    assert p95(hidden) < stall / 4
    assert p95(shown) > stall / 2
    late = [sample for sample in shown if sample.generation_time > stall / 4]
    assert len(late) > 10


def test_a_closed_loop_keeps_exactly_its_clients_busy() -> None:
    target = Scripted(service=0.002)
    samples = closed(target, Plan(requests=12), clients=3)
    assert target.most == 3
    assert [sample.number for sample in samples] == list(range(12))
    assert [sample.level for sample in samples] == [3] * 12
    assert all(sample.scheduled == sample.started for sample in samples)
    plan = Plan()
    assert sorted(target.seen) == sorted(plan.request("concurrent", n, 3).sampling.seed for n in range(12))


def test_a_duration_ends_a_phase_and_requests_end_it_sooner() -> None:
    samples = closed(Scripted(service=0.02), Plan(duration=0.31), clients=2)  # one story at a time
    assert len(samples) == 15 + 2  # those that ended in time, and what both clients had open then
    assert max(sample.started for sample in samples) < 0.31
    assert len(closed(Scripted(service=0.02), Plan(requests=4, duration=5.0), clients=2)) == 4
    assert len(opened(Scripted(), Plan(requests=3, duration=5.0, rate=200.0))) == 3
    few = opened(Scripted(), Plan(duration=0.2, rate=50.0))
    assert max(sample.scheduled for sample in few) < 0.2


def test_the_open_loop_sends_at_its_times_whether_or_not_it_is_answered() -> None:
    plan = Plan(requests=20, rate=200.0, seed=4)
    target = Scripted(service=0.05)  # a fifth of what would be needed to keep up
    samples = opened(target, plan)
    due = [sample.scheduled - samples[0].scheduled for sample in samples]
    times = list(islice(arrival_times(200.0, 4), 20))
    assert due == pytest.approx([time - times[0] for time in times])
    assert target.most > 10
    assert all(sample.started >= sample.scheduled for sample in samples)
    assert samples[-1].generation_time > 10 * 0.05


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 500))
def test_arrivals_are_a_poisson_process_of_their_seed(seed: int, rate: float) -> None:
    times = list(islice(arrival_times(rate, seed), 400))
    assert times == list(islice(arrival_times(rate, seed), 400))
    gaps = [after - before for before, after in pairwise([0.0, *times])]
    assert min(gaps) >= 0
    # Exponential: mean and deviation are both 1/rate; 400 draws have them within 25 % and 40 %.
    assert np.mean(gaps) * rate == pytest.approx(1, rel=0.25)
    assert np.std(gaps) * rate == pytest.approx(1, rel=0.4)


def test_a_failure_is_a_row_and_a_timeout_too() -> None:
    async def one(target: Scripted, timeout: float) -> Sample:
        plan = Plan(requests=1, timeout=timeout)
        return await LoadGenerator(plan).ask(target, "single", plan.request("single", 0))  # type: ignore[arg-type]

    busy = virtual_time.run(one(Scripted(fail=Failed("busy", "the queue\nis full")), 5.0))
    assert (busy.error, busy.message, busy.ok, busy.finish) == ("busy", "the queue is full", False, "")
    slow_target = Scripted(service=30.0)
    slow = virtual_time.run(one(slow_target, 0.05))
    assert (slow.error, slow.message, slow.tokens) == ("timeout", "not done within 0.05 s", 0)
    assert slow.ended - slow.started == pytest.approx(0.05)
    assert slow_target.open == 0, "the request was given up, not left behind"


def both(ours: Paced, theirs: Paced, plan: Plan) -> tuple[list[Sample], Comparison]:
    samples = virtual_time.run(LoadGenerator(plan).in_turn(ours, theirs))
    return samples, summarise(samples, theirs, seed=plan.seed)


def test_a_target_that_is_half_as_fast_shows_a_difference() -> None:
    log: list[tuple[str, int]] = []
    ours, theirs = Paced(0.02, log, "ours"), Paced(0.01, log, "theirs", digest="ab" * 32)
    _, found = both(ours, theirs, Plan(requests=10, concurrency=3))
    assert found.ratios["itl_ratio"].value == pytest.approx(2)
    assert found.ratios["generation_time_ratio"].value == pytest.approx(2)
    assert found.ratios["tokens_per_second_ratio"].value == pytest.approx(0.5)
    assert found.ratios["total_tokens_per_second_ratio"].value == pytest.approx(0.5)
    assert all(ratio.excludes(1) for ratio in found.ratios.values())
    assert (found.against, found.against_digest) == ("theirs", "ab" * 32)
    assert {name: figure.n for name, figure in found.figures().items()} == {
        "generation_time_ratio": 10,
        "ttft_ratio": 10,
        "itl_ratio": 10,
        "tokens_per_second_ratio": 10,
        "total_tokens_per_second_ratio": 3,
    }


def test_both_are_asked_the_same_in_turn_and_who_begins_changes() -> None:
    log: list[tuple[str, int]] = []
    samples, found = both(Paced(0.0, log, "ours"), Paced(0.0, log, "theirs"), Plan(requests=12, concurrency=2))
    seeds = {name: [seed for who, seed in log if who == name] for name in ("ours", "theirs")}
    assert seeds["ours"] == seeds["theirs"]
    assert len(set(seeds["ours"])) == len(seeds["ours"]) == 12 + 3 * 2
    alone = [row for row in samples if row.level == 1]
    for first, second in zip(alone[::2], alone[1::2], strict=True):
        assert {first.target, second.target} == {"target", "against"}
        assert (first.number, first.seed) == (second.number, second.seed)
    assert len({first.target for first in alone[::2]}) == 2
    assert (found.pairs, found.success_rate, found.against_success_rate) == (18, 1.0, 1.0)


def test_a_round_in_which_one_side_failed_counts_in_the_success_rate_only() -> None:
    log: list[tuple[str, int]] = []
    _, found = both(Paced(0.001, log, "ours", every=3), Paced(0.001, log, "theirs"), Plan(requests=9, concurrency=2))
    # 9 alone and 3 rounds of two: of 15 requests each third failed.
    assert (found.success_rate, found.against_success_rate) == pytest.approx((10 / 15, 1.0))
    assert found.ratios["ttft_ratio"].n < 9


def test_without_a_pair_nothing_is_claimed() -> None:
    rows = [failed("compare"), row("compare", target="against")]
    found = summarise(rows, Paced(0.0), seed=0)
    assert found.ratios == {}
    assert (found.success_rate, found.against_success_rate) == (0.0, 1.0)
