"""The study of steering runs and counts; how fast it was is for the log, not for a test."""

from __future__ import annotations

import json
import sys

import pytest

from experiments.studies import steering_speed


@pytest.mark.parametrize("form", ["json", "table"])
def test_forks_and_fans_are_timed_and_printed(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--repetitions", "2", *(["--json"] if form == "json" else [])]
    monkeypatch.setattr(sys, "argv", ["steering_speed", *options])
    steering_speed.main()
    printed = capsys.readouterr().out
    if form == "json":
        rows = json.loads(printed)
        assert [row["measure"] for row in rows] == ["first word of a fork", "fan of 16 x 40 tokens"]
        assert [(row["target_ms"], row["n"]) for row in rows] == [(50, 2), (250, 2)]
        assert all(0 < row["median_ms"] <= row["p95_ms"] for row in rows)
    else:
        header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
        assert header == ["measure", "median_ms", "p95_ms", "target_ms", "n"]
        assert [line[-1] for line in lines] == ["2", "2"]


def test_no_repetition_is_bad_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["steering_speed", "--repetitions", "0"])
    with pytest.raises(SystemExit) as ended:
        steering_speed.main()
    assert ended.value.code == 2
    assert "--repetitions must be at least 1" in capsys.readouterr().err
