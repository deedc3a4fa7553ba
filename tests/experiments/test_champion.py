"""The champion that CI compares with is the model that ships, and holds what is asked on our own stories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.common.thresholds import THRESHOLDS, load_thresholds
from experiments.gate.decide import load_champion
from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [{"id": "a", "nats": "many", "tokens": 1, "bytes": 1}]}, r"losses\.0\.nats must be a valid number"),
        ({"losses": [{"id": "a", "nats": 1.0, "tokens": 1}]}, r"losses\.0\.bytes is missing"),
        ({"losses": []}, "losses must have at least 1 item"),
        ({"format": 2}, "format must be 1, got 2"),
        ({"digest": "' or '1' = '1"}, "digest must match pattern"),
    ],
)
def test_a_damaged_file_of_losses_names_the_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    path.write_text(json.dumps(json.loads(CHAMPION.read_text()) | changes))
    with pytest.raises(InputError, match=rf"against-file .*losses\.json is not a champion's losses \({message}"):
        load_champion(path)
