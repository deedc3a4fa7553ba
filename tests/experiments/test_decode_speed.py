"""The speed report counts what was written; how fast it was is for the log, not for a test."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experiments.decode_speed import measure
from model.folder import PRETRAINED


def test_all_targets_take_turns_and_are_counted() -> None:
    rows = measure(PRETRAINED, [1, 3], seconds=0.1, rounds=1)
    assert [(row.target, row.streams) for row in rows] == [
        ("engine int8", 1), ("engine int8", 3), ("engine fp32", 1), ("engine fp32", 3),
        ("PyTorch eager fp32 step", 1),
    ]  # fmt: skip
    assert rows[0].ratio == 1
    for row in rows:
        assert row.total_tokens_per_second > 0
        assert row.tokens_per_second * row.streams == pytest.approx(row.total_tokens_per_second)
        assert 0 < row.itl_p50 <= row.itl_p99


def test_the_script_prints_json() -> None:
    command = [sys.executable, "-m", "experiments.decode_speed"]
    options = ["--streams", "1", "--seconds", "0.2", "--rounds", "1", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert [row["streams"] for row in json.loads(done.stdout)] == [1, 1, 1]
