"""How often a kept name would forbid what a story says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.studies.spelling import main


def test_tokens_that_a_name_forbids_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = tmp_path / "stories.jsonl"
    texts = ["Quibbly sat. The cat saw Quibbly.", "Quibbly sat. A quick cat saw Quinoa."]
    stories.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    main([str(stories)])
    first, *others = capsys.readouterr().out.splitlines()
    assert first.endswith(" 1 of them forbidden and there")
    assert [line.split() for line in others] == [["1", "'Quin'"]]
