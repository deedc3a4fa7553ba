"""What training shows of itself: flat parameters and sample stories."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.training.tracked import RECIPE, evaluation
from training.tracking.observer import folder_digest, samples_rows
from training.tracking.runs import flat


def test_flat_parameters_are_the_recipe_s_leaves() -> None:
    assert flat(RECIPE) == {
        "name": "tiny",
        "seed": "0",
        "minutes": "null",
        "compile": "true",
        "model.width": "64",
        "model.pattern": "RRA",
        "optimizer.name": "muon",
        "optimizer.matrix_lr": "0.02",
        "samples": '["Once upon a time"]',
    }


def test_folders_do_not_leave_the_machine() -> None:
    recipe = {
        "data": Path("/home/someone/data/tiny"),
        "files": ["/home/someone/a.jsonl", "b"],
        "x": "C:\\me\\y",
    }
    assert flat(recipe) == {"data": "tiny", "files": '["a.jsonl", "b"]', "x": "y"}


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.lists(st.integers())
names = st.text("abc_", min_size=1, max_size=3)
tables = st.dictionaries(names, leaves, max_size=3)


@given(st.dictionaries(names, leaves | tables | st.dictionaries(names, tables, max_size=2), max_size=4))
def test_a_recipe_can_be_rebuilt_from_its_flat_parameters(recipe: dict[str, Any]) -> None:
    rebuilt: dict[str, Any] = {}
    for key, text in flat(recipe).items():
        *folders, name = key.split(".")
        place = rebuilt
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = json.loads(text)
    assert rebuilt == recipe


def test_the_table_of_samples_is_json_that_a_browser_reads() -> None:
    rows = samples_rows(evaluation(1, math.nan))
    assert json.loads(json.dumps(rows, allow_nan=False))[0][:4] == [1, 512, None, None]


def test_the_digest_of_a_folder_follows_names_and_contents(tmp_path: Path) -> None:
    digests = set()
    for number, (name, content) in enumerate([("a", "x"), ("a", "y"), ("b", "x")]):
        folder = tmp_path / str(number) / "deep"
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
        digests.add(folder_digest(folder.parent))
        assert folder_digest(folder.parent) == folder_digest(folder.parent)
    assert len(digests) == 3
