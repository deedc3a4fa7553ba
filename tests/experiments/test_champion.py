"""The champion that CI compares with is the model that ships, and holds what is asked on our own stories."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.common.thresholds import THRESHOLDS, load_thresholds
from experiments.gate.evidence import load_champion
from model.architecture.folder import PRETRAINED, ModelFolder
from training.data.corpus import load_own_stories, story_id

CHAMPION = THRESHOLDS.with_name("champion.json")


def test_the_champion_in_the_repository_is_the_model_that_ships() -> None:
    champion = load_champion(CHAMPION)
    assert champion.digest == ModelFolder.open(PRETRAINED).digest, (
        "model/pretrained has changed: make experiments/champion.json again (docs/evaluation.md, The gate in CI)"
    )
    assert [loss.id for loss in champion.losses] == [story_id(story.text) for story in load_own_stories("heldout")]
    bits = sum(loss.nats for loss in champion.losses) / sum(loss.bytes for loss in champion.losses) / 0.6931471805599453
    bound = next(entry for entry in load_thresholds() if entry.stories == "own")
    assert bound.holds(bits)
    assert f"{bits:.3f}" in bound.reason, "the reason says what was measured"


def test_the_champion_names_no_machine(repository: Path) -> None:
    assert set(json.loads(CHAMPION.read_text())) == {"format", "digest", "data_digest", "losses"}
    assert str(repository) not in CHAMPION.read_text()
