"""The speed report counts what was generated; how fast it was is for the log, not for a test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.studies.decode_speed import measure
from model.architecture.folder import PRETRAINED
from tests.model.runtimes.shared import NOT_NATIVE


def engines() -> list[str]:
    """The names of the engines that this machine can run, without the path that its processor takes."""
    native = [] if NOT_NATIVE else ["engine native int8"]
    return [*native, "engine onnx int8", "engine onnx fp32"]


def test_all_targets_take_turns_and_are_counted() -> None:
    rows = measure(PRETRAINED, [1, 3], seconds=0.1, rounds=1)
    plain = ["plain C fp32 decoder"] if shutil.which("cc") else []
    found = [(" ".join(row["target"].split()[:3]), row["streams"]) for row in rows[len(plain) : -1]]
    assert found == [(name, streams) for name in engines() for streams in (1, 3)]
    assert [row["target"] for row in rows[: len(plain)]] == plain
    assert rows[-1]["target"] == "PyTorch eager fp32 step"
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["total_tokens_per_second"] > 0
        assert row["tokens_per_second"] * row["streams"] == pytest.approx(row["total_tokens_per_second"])


def test_the_script_prints_a_markdown_table(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.studies.decode_speed"]
    options = ["--streams", "1", "--seconds", "0.05", "--rounds", "1"]
    # Without a compiler on the PATH the plain decoder is left out, and stderr says so.
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [*command, *options], cwd=repository, env=environment, capture_output=True, text=True, check=True
    )
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert header == ["target", "streams", "tokens_per_second", "total_tokens_per_second", "ratio"]
    assert [row[1] for row in rows] == ["1"] * (len(engines()) + 1)
    assert "without the plain C decoder: there is no C compiler (cc)" in done.stderr
