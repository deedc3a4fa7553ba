"""Every `run:` step of the model gate's workflow, run by bash on a copy of this checkout, with the real commands.

Small: fewer stories and requests than in CI, by the job's own variables. The slow tests take CI's numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.gate.run import MARK
from model.architecture.folder import ModelFolder
from model.runtimes.native.library import library_file
from tests.workflows.workflow import WORKFLOWS, Runner, read, run_steps

WORKFLOW = read(WORKFLOWS / "validate-model.yml")
CHAMPION, QUALITY, SPEED, GATE = run_steps(WORKFLOW, "validate-model")
(COMMENT,) = run_steps(WORKFLOW, "comment")
GIVEN = {name: value for name, value in WORKFLOW["jobs"]["validate-model"]["env"].items() if "${{" not in value}
NO_COMMIT = "0" * 40
"""What GitHub calls the commit before a branch's first."""
SMALL = """
thresholds:
  - {metric: success_rate, unit: share, at_least: 0.60, scope: benchmark, reason: small, min_n: 12}
  - {metric: error_rate, unit: share, below: 0.50, scope: benchmark, reason: small, min_n: 6}
  - {metric: avg_generation_time, unit: s, at_most: 10, scope: benchmark, reason: small, min_n: 12}
  - {metric: bits_per_byte, unit: bits/byte, at_most: 1.9, scope: quality, reason: small, min_n: 12}
  - {metric: bits_per_byte_difference, unit: bits/byte, at_most: 0.002, scope: compare, reason: small, min_n: 12}
"""


GH = """#!/bin/sh
case "$*" in
"pr comment 7 --edit-last --body-file comment.md") test -f "$COMMENTS/1" && cp comment.md "$COMMENTS/1" ;;
"pr comment 7 --body-file comment.md") cp comment.md "$COMMENTS/$(($(ls "$COMMENTS" | wc -l) + 1))" ;;
*) echo "gh: $*" >&2; exit 2 ;;
esac
"""
"""GitHub's command line, as far as the job uses it: it fails to edit a last comment that there is not."""
QUICK = "--requests 12 --concurrency 4 --max-tokens 40 --phases single,concurrent"
"""Of a benchmark: enough for a verdict on quality to stand beside it."""


def _runner(place: Path) -> tuple[Runner, dict[str, str]]:
    """A checkout to run in, and the job's variables as they stand in the file."""
    if library_file() is None:
        pytest.skip("the job decodes natively, and the decoder in C is not built here")
    place.mkdir()
    return Runner(place), {**GIVEN, "BASE": NO_COMMIT}


def _junit(runner: Runner) -> dict[str, str]:
    """Verdict by metric, as a CI server reads it."""
    suite = ElementTree.parse(runner.checkout / "evidence" / "gate.xml").getroot()[0]
    return {str(case.get("name")): case[0].tag if len(case) else "pass" for case in suite}


def test_the_shipped_model_goes_through_every_step_and_one_comment_says_so(tmp_path: Path, tracking_uri: str) -> None:
    runner, given = _runner(tmp_path / "ci")
    (runner.checkout / "evidence").mkdir()
    shutil.copy(tracking_uri.removeprefix("sqlite:///"), runner.checkout / "evidence" / "mlflow.db")
    (tmp_path / "small.yaml").write_text(SMALL)
    given |= {
        "THRESHOLDS": str(tmp_path / "small.yaml"),
        "EVALUATE": "--runtime native --no-write --limit 16",
        "BENCHMARK": "--requests 8 --concurrency 4 --rate 20 --max-tokens 12 --phases single,concurrent,open",
    }
    for step in (CHAMPION, QUALITY, SPEED, GATE):
        done = runner.run(step, **given)
        assert done.returncode == 0, f"{step['name']}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    evidence = runner.checkout / "evidence"
    assert "our own held-out stories" in (evidence / "quality.txt").read_text()
    assert set(_junit(runner).values()) == {"pass"}
    assert list(evidence.glob("mlartifacts/**/*.png")), "the figures are among what is uploaded"
    summary = runner.summary.read_text()
    assert summary.startswith(MARK)
    assert "Model gate: PASS" in summary
    assert "# Model benchmark report" in summary

    (runner.place / "bin" / "gh").write_text(GH)
    (runner.place / "bin" / "gh").chmod(0o755)
    comments = runner.place / "comments"
    comments.mkdir()
    runner.environment |= {"COMMENTS": str(comments), "PULL_REQUEST": "7"}
    for _ in range(2):
        done = runner.run(COMMENT)
        assert done.returncode == 0, done.stderr
    (comment,) = comments.iterdir()
    assert comment.read_text().startswith(MARK)
    assert "<summary>The benchmark</summary>" in comment.read_text()


def _whole(runner: Runner, given: dict[str, str]) -> dict[str, int]:
    """Exit codes of the steps by name, until one fails: as a runner goes on."""
    codes = {}
    for step in (CHAMPION, QUALITY, SPEED, GATE):
        codes[step["name"]] = runner.run(step, **given).returncode
        if codes[step["name"]]:
            break
    return codes


@pytest.mark.slow
def test_the_shipped_model_passes_with_ci_s_own_numbers_and_thresholds(tmp_path: Path) -> None:
    runner, given = _runner(tmp_path / "ci")
    assert set(_whole(runner, given).values()) == {0}, runner.summary.read_text()
    assert set(_junit(runner).values()) == {"pass"}


@pytest.mark.slow
def test_noised_weights_in_a_pull_request_fail_the_job_for_their_bits_per_byte(tmp_path: Path) -> None:
    runner, given = _runner(tmp_path / "ci")
    base = runner.head()
    _noise(runner.checkout / "model" / "pretrained", tmp_path, strength=0.1)
    # Even if the pull request brings a champion of its own: the base's is what counts.
    champion: dict[str, Any] = json.loads((runner.checkout / "experiments" / "champion.json").read_text())
    champion["digest"] = ModelFolder.open(runner.checkout / "model" / "pretrained").digest
    (runner.checkout / "experiments" / "champion.json").write_text(json.dumps(champion))
    runner.commit("a model that is worse")
    given |= {"BASE": base, "EVALUATE": "--runtime native --no-write", "BENCHMARK": f"{QUICK},compare"}
    codes = _whole(runner, given)
    assert codes[GATE["name"]] == 1, codes
    found = _junit(runner)
    assert found["bits_per_byte_difference"] == "failure"
    assert found["bits_per_byte"] == "pass", "a bound of its own would not have seen it"
    # The same network, asked in turn with the champion: no slower, however busy this machine is.
    assert "failure" not in (found["ttft_ratio"], found["total_tokens_per_second_ratio"])
    assert "Model gate: FAIL" in runner.summary.read_text()


@pytest.mark.slow
def test_too_little_evidence_fails_the_job_as_undecided(tmp_path: Path) -> None:
    runner, given = _runner(tmp_path / "ci")
    given |= {
        "EVALUATE": "--runtime native --no-write --limit 16",
        "BENCHMARK": "--requests 8 --concurrency 4 --rate 20 --max-tokens 12 --phases single,concurrent,open",
    }
    assert _whole(runner, given)[GATE["name"]] == 3
    assert "error" in _junit(runner).values()
    assert "failure" not in _junit(runner).values()


def _noise(folder: Path, place: Path, *, strength: float) -> None:
    """The model in `folder` again, with noise on every weight in proportion to that tensor's own spread."""
    from training.export.export import export_checkpoint

    checkpoint = place / "checkpoint"
    shutil.copytree(folder, checkpoint)
    rng = np.random.default_rng(0)
    weights = load_file(checkpoint / "model.safetensors")
    worse = {
        name: (value + strength * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
        for name, value in weights.items()
    }
    save_file(worse, checkpoint / "model.safetensors")
    shutil.rmtree(folder)
    export_checkpoint(checkpoint, folder)
