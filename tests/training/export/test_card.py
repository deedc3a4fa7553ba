from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.architecture.network import StoryNetwork
from tests.training.runs import MODEL, smallest
from training.export.acceptance import Acceptance
from training.export.export import history, write_card

FIRST: dict[str, Any] = {
    "recipe": smallest(name="first").as_dict(),
    "data": "aa11",
    "step": 1200,
    "tokens": 5_000_000,
    "elapsed": 600.0,
}
SECOND: dict[str, Any] = {
    "recipe": smallest(name="second", seed=7, dropout=0.1, average=0.98).as_dict(),
    "data": "bb22",
    "step": 90,
    "tokens": 70_000,
    "elapsed": 120.0,
    "best_bits_per_byte": 0.5,
    "init": {"digest": "c" * 64, **FIRST},
}


def card(folder: Path, notes: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps({"format": 1, "model": MODEL.as_dict(), **notes}))
    accepted = [Acceptance(precision="fp32", spread=2.5, largest={1: 1e-6})]
    write_card(folder, StoryNetwork(MODEL), accepted)
    return (folder / "card.md").read_text("utf-8")


def test_a_model_that_was_trained_in_one_run_tells_of_one(tmp_path: Path) -> None:
    notes = card(tmp_path, FIRST)
    assert "- recipe `first`, seed 0, peak rate 0.02, 1,200 steps, 5,000,000 tokens, 10 minutes" in notes
    assert "from the weights of" not in notes
    assert "not validated" in notes


def test_a_continuation_tells_each_run_in_order_and_what_was_other_in_it(tmp_path: Path) -> None:
    notes = card(tmp_path, SECOND)
    lines = [line for line in notes.splitlines() if "recipe `" in line]
    assert lines == [
        "- recipe `first`, seed 0, peak rate 0.02, 1,200 steps, 5,000,000 tokens, 10 minutes; data digest `aa11`",
        "- from the weights of `cccccccccccc`: recipe `second`, seed 7, peak rate 0.02, dropout 0.1, average of the "
        "weights 0.98, 90 steps, 70,000 tokens, 2 minutes; data digest `bb22`",
    ]
    assert "0.5000 bits per byte" in notes


def test_the_history_begins_with_the_first_run() -> None:
    assert history(SECOND) == [SECOND["init"], SECOND]
    assert history(FIRST) == [FIRST]
