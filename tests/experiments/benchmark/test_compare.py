"""Two targets in turn: the interval is a bootstrap's, both are asked the same, and a drift slows both alike."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from experiments.benchmark.compare import Comparison, compare, summarise
from experiments.benchmark.load.one import Clock
from experiments.benchmark.plan import Plan
from experiments.benchmark.sample import Sample
from experiments.benchmark.targets.base import Ending, Failed, Listener
from model.generation import GenerationRequest
from tests.experiments.benchmark.rows import failed, row


@dataclass
class Paced:
    """Writes a token every `step` seconds (scripted: the pace is what is tested), and fails each `every`th time."""

    step: float
    log: list[tuple[str, int]]
    name: str = "paced"
    digest: str | None = None
    every: int = 0
    asked: int = field(default=0)

    async def write(self, request: GenerationRequest, listener: Listener) -> Ending:
        self.log.append((self.name, request.sampling.seed))
        self.asked += 1
        if self.every and self.asked % self.every == 0:
            raise Failed("busy", "no")
        for _ in range(4):
            await asyncio.sleep(self.step)
            listener.arrived(1)
        listener.whole()
        return Ending("length", 4)

    write_cold = write


def both(ours: Paced, theirs: Paced, plan: Plan) -> tuple[list[Sample], Comparison]:
    samples = asyncio.run(compare(ours, theirs, plan, Clock()))  # type: ignore[arg-type]
    return samples, summarise(samples, theirs, seed=plan.seed)  # type: ignore[arg-type]


def test_a_target_that_is_half_as_fast_is_told_apart() -> None:
    log: list[tuple[str, int]] = []
    ours, theirs = Paced(0.02, log, "ours"), Paced(0.01, log, "theirs", digest="ab" * 32)
    _, found = both(ours, theirs, Plan(requests=10, concurrency=3))
    assert found.ratios["itl"].value == pytest.approx(2, rel=0.25)
    assert found.ratios["generation_time"].value == pytest.approx(2, rel=0.25)
    assert found.ratios["tokens_per_second"].value == pytest.approx(0.5, rel=0.25)
    assert found.ratios["total_tokens_per_second"].value == pytest.approx(0.5, rel=0.25)
    assert all(ratio.excludes(1) for ratio in found.ratios.values())
    assert (found.against, found.against_digest) == ("theirs", "ab" * 32)
    assert {name: figure.n for name, figure in found.figures().items()} == {
        "generation_time_ratio": 10, "ttft_ratio": 10, "itl_ratio": 10, "tokens_per_second_ratio": 10,
        "total_tokens_per_second_ratio": 3,
    }  # fmt: skip


def test_both_are_asked_the_same_in_turn_and_who_begins_changes() -> None:
    log: list[tuple[str, int]] = []
    samples, found = both(
        Paced(0.0, log, "ours"), Paced(0.0, log, "theirs"), Plan(requests=12, concurrency=2)
    )
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
    _, found = both(
        Paced(0.001, log, "ours", every=3), Paced(0.001, log, "theirs"), Plan(requests=9, concurrency=2)
    )
    # 9 alone and 3 rounds of two: of 15 requests each third failed.
    assert (found.success_rate, found.against_success_rate) == pytest.approx((10 / 15, 1.0))
    assert found.ratios["ttft"].n < 9


def test_without_a_pair_nothing_is_claimed() -> None:
    rows = [failed("compare"), row("compare", target="against")]
    found = summarise(rows, Paced(0.0, [], "theirs"), seed=0)  # type: ignore[arg-type]
    assert found.ratios == {}
    assert (found.success_rate, found.against_success_rate) == (0.0, 1.0)
