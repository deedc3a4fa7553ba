"""Three values, never two: pass at the pessimistic bound, fail at the optimistic one, and undecided between them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.statistics import ONE_SIDED, Estimate, wilson
from experiments.common.thresholds import Threshold, Thresholds, load_thresholds
from experiments.gate.decide import Check, Decision, Evidence, Verdict, decide, judge, overall
from experiments.quality.evidence import QualityEvidence, StoryLoss
from experiments.quality.held_out import digest_of, read_held_out
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import small_tokenizer
from training.data.corpus import load_own_stories

OWN = digest_of(story.text for story in load_own_stories("heldout"))


def judged_on(data_digest: str) -> Evidence:
    """60 stories of 100 bytes with 1.2 bits for each byte: too many for TinyStories, few enough for our own."""
    losses = tuple(StoryLoss(id=f"{number:012x}", nats=120 * math.log(2), tokens=30, bytes=100) for number in range(60))
    quality = QualityEvidence(
        run_id="r",
        digest="d",
        began=datetime.now(UTC),
        metrics={},
        tags={"data.digest": data_digest},
        losses=losses,
        stories=(),
    )
    return Evidence(digest="d", quality=quality, benchmark="none")


@pytest.fixture
def bounds(tmp_path: Path) -> Thresholds:
    path = tmp_path / "thresholds.yaml"
    path.write_text(
        "thresholds:\n"
        "  - {metric: bits_per_byte, unit: bits/byte, at_most: 0.85, scope: quality, stories: other, reason: r}\n"
        "  - {metric: bits_per_byte, unit: bits/byte, at_most: 1.75, scope: quality, stories: own, reason: r}\n"
    )
    return load_thresholds(path)


@pytest.mark.parametrize(("data", "limit", "verdict"), [(OWN, 1.75, "pass"), ("another", 0.85, "fail")])
def test_the_bound_is_that_of_the_stories_that_were_read(
    data: str, limit: float, verdict: str, bounds: Thresholds
) -> None:
    (check,) = decide(judged_on(data), bounds).checks
    assert (check.threshold.limit, check.verdict) == (limit, verdict)


def test_without_an_evaluation_the_usual_bound_is_undecided(bounds: Thresholds) -> None:
    evidence = Evidence(digest="d", quality="none", benchmark="none")
    (check,) = decide(evidence, bounds).checks
    assert (check.threshold.limit, check.verdict) == (0.85, "undecided")


def test_our_own_stories_are_known_by_what_an_evaluation_logs_of_them() -> None:
    assert read_held_out(None, StoryTokenizer.load(small_tokenizer())).digest == OWN


def share(successes: int, n: int) -> Estimate:
    return wilson(successes, n, level=ONE_SIDED)


def threshold(**changes: Any) -> Threshold:
    values: dict[str, Any] = {
        "metric": "success_rate",
        "unit": "share",
        "scope": "benchmark",
        "reason": "a reason",
        "at_least": 0.8,
    }
    return Threshold(**(values | changes))


SLOW: dict[str, Any] = {"metric": "avg_generation_time", "unit": "s", "at_least": None, "at_most": 10.0}


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        (Estimate(0.95, 0.85, 0.99, 40), "pass"),
        (Estimate(0.85, 0.80, 0.90, 40), "pass"),
        (Estimate(0.85, 0.79, 0.90, 40), "undecided"),
        (Estimate(0.75, 0.60, 0.85, 40), "undecided"),
        (Estimate(0.60, 0.50, 0.79, 40), "fail"),
    ],
)
def test_a_lower_bound_is_decided_by_its_pessimistic_side(bounds: Estimate, verdict: Verdict) -> None:
    assert judge(threshold(), bounds).verdict == verdict


def test_an_upper_bound_is_decided_the_other_way_round() -> None:
    assert judge(threshold(**SLOW), Estimate(8, 7, 9, 30)).verdict == "pass"
    assert judge(threshold(**SLOW), Estimate(8, 7, 11, 30)).verdict == "undecided"
    assert judge(threshold(**SLOW), Estimate(12, 11, 13, 30)).verdict == "fail"


def test_too_few_observations_decide_nothing_however_good_they_are() -> None:
    check = judge(threshold(min_n=30), share(29, 29))
    assert check.verdict == "undecided"
    assert check.margin == pytest.approx(0.2)
    assert "29 observations are too few" in check.why


def test_ten_of_ten_is_not_enough_to_claim_four_in_five() -> None:
    assert judge(threshold(), share(10, 10)).verdict == "undecided"
    assert judge(threshold(), share(19, 20)).verdict == "pass"
    assert judge(threshold(), share(10, 20)).verdict == "fail"


def test_missing_evidence_is_undecided_and_says_why() -> None:
    check = judge(threshold(), "it was never measured")
    assert (check.verdict, check.bounds, check.margin) == ("undecided", None, None)
    assert check.as_dict()["why"] == "it was never measured"


@pytest.mark.parametrize("verdicts", list(itertools.product(("pass", "fail", "undecided"), repeat=3)))
def test_a_version_passes_only_if_every_check_does(verdicts: tuple[Verdict, ...]) -> None:
    together = overall(verdicts)
    assert (together == "pass") == all(each == "pass" for each in verdicts)
    assert (together == "fail") == ("fail" in verdicts)


def test_of_no_check_nothing_can_be_said() -> None:
    assert overall([]) == "undecided"


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 1000))
def test_nan_and_disorder_never_pass(low: float, value: float, high: float, n: int) -> None:
    low, value, high = sorted((low, value, high))
    verdict = judge(threshold(), Estimate(value, low, high, n)).verdict
    assert (verdict == "pass") == (low >= 0.8)
    assert judge(threshold(), Estimate(float("nan"), float("nan"), float("nan"), n)).verdict != "pass"


def test_the_exit_code_reports_the_verdict() -> None:
    def decision(*checks: Check) -> Decision:
        return Decision(digest="d" * 64, version=1, champion=None, checks=checks, thresholds_digest="t")

    good, bad = judge(threshold(), share(50, 50)), judge(threshold(), share(5, 50))
    assert decision(good).exit_code == 0
    assert decision(good, bad).exit_code == 1
    assert decision(good, judge(threshold(), "gone")).exit_code == 3


@pytest.mark.parametrize(("keeping", "verdict"), [(62, "pass"), (52, "undecided"), (32, "fail")])
def test_a_bound_on_rare_names_is_decided_by_the_stories_that_had_them(
    keeping: int, verdict: str, tmp_path: Path
) -> None:
    """Of 64 prompts; the stories of the other prompts say nothing about it."""
    path = tmp_path / "thresholds.yaml"
    path.write_text(
        "thresholds:\n  - {metric: rare_names/kept, unit: share, at_least: 0.8, scope: quality, reason: r, min_n: 50}\n"
    )
    evidence = judged_on("another")
    assert isinstance(evidence.quality, QualityEvidence)
    names = [{"number": number, "seed": 0, "kept": float(number < keeping)} for number in range(64)]
    others = [{"number": number, "seed": 0, "kept": 1.0 - (keeping == 62)} for number in range(64)]
    quality = evidence.quality.model_copy(update={"rare_names": tuple(names), "stories": tuple(others)})
    (check,) = decide(replace(evidence, quality=quality), load_thresholds(path)).checks
    assert check.verdict == verdict
    (check,) = decide(evidence, load_thresholds(path)).checks
    assert check.verdict == "undecided"
