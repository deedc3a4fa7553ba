"""Which bounds a version is judged by: where one depends on the stories that were read, the one for these stories."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.common.thresholds import Thresholds, load_thresholds
from experiments.gate.decide import decide
from experiments.gate.evidence import Evidence, Found
from experiments.quality.evidence import QualityEvidence, StoryLoss
from experiments.quality.held_out import digest_of, read_held_out
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import small_tokenizer
from training.data.corpus import load_own_stories

OWN = digest_of(story.text for story in load_own_stories("heldout"))


def judged_on(data_digest: str) -> Evidence:
    """60 stories of 100 bytes with 1.2 bits for each byte: too many for TinyStories, few enough for our own."""
    losses = tuple(
        StoryLoss(id=f"{number:012x}", nats=120 * math.log(2), tokens=30, bytes=100) for number in range(60)
    )
    quality = QualityEvidence(
        run_id="r", digest="d", ended_at=0, metrics={}, params={}, tags={"data.digest": data_digest},
        losses=losses, stories=(),
    )  # fmt: skip
    return Evidence(digest="d", quality=Found(quality=quality), benchmark=Found(missing="none"))


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
    evidence = Evidence(digest="d", quality=Found(missing="none"), benchmark=Found(missing="none"))
    (check,) = decide(evidence, bounds).checks
    assert (check.threshold.limit, check.verdict) == (0.85, "undecided")


def test_our_own_stories_are_known_by_what_an_evaluation_logs_of_them() -> None:
    assert read_held_out(None, StoryTokenizer.load(small_tokenizer())).digest == OWN
