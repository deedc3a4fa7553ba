"""The workflows are valid by the public schemas, run in the documented order, and their scripts parse."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.workflow import REPOSITORY, WORKFLOWS, read

FILES = sorted(WORKFLOWS.glob("*.yml"))
ACTIONS = sorted((REPOSITORY / ".github" / "actions").rglob("action.yml"))
JOBS = [(name, job) for path in FILES for name, job in read(path)["jobs"].items()]
ORDER = ["lint", "test-and-build", "security", "validate-model", "deploy"]


def _schema(name: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _steps() -> list[tuple[str, dict[str, Any]]]:
    found = [(name, step) for name, job in JOBS for step in job.get("steps", [])]
    return found + [(str(path), step) for path in ACTIONS for step in read(path)["runs"]["steps"]]


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-workflows", FILES),
        ("vendor.github-actions", ACTIONS),
        ("vendor.dependabot", [REPOSITORY / ".github" / "dependabot.yml"]),
    ],
)
def test_each_file_holds_to_the_public_schema(schema: str, paths: list[Path]) -> None:
    assert paths
    found = _schema(schema, *paths)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_schema_sees_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(FILES[0].read_text().replace("runs-on:", "run-on:"))
    assert "run-on" in _schema("vendor.github-workflows", wrong).stdout


def test_the_jobs_of_the_pipeline_wait_for_each_other_in_the_documented_order() -> None:
    jobs = read(WORKFLOWS / "pipeline.yml")["jobs"]
    assert list(jobs) == ORDER
    for before, after in itertools.pairwise(ORDER):
        needs = jobs[after]["needs"]
        assert before in ([needs] if isinstance(needs, str) else needs)
    assert "needs" not in jobs["lint"]


@pytest.mark.parametrize(("name", "job"), JOBS, ids=[name for name, _ in JOBS])
def test_every_job_has_a_time_limit(name: str, job: dict[str, Any]) -> None:
    # A called workflow's own jobs have the limits.
    assert "uses" in job or 0 < job["timeout-minutes"] <= 60


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        (
            "unpinned-uses",
            "download-artifact@3e5f45b2cfb9172054b4087a40e8e0b5a5461e7c # v8.0.1",
            "download-artifact@v8",
        ),
        ("dangerous-triggers", "pull_request:", "pull_request_target:"),
        ("excessive-permissions", "permissions: {}", "permissions: write-all"),
        ("template-injection", 'echo "image=$REGISTRY', 'echo "image=${{ github.head_ref }}'),
        ("secrets-inherit", "validate-model.yml\n", "validate-model.yml\n    secrets: inherit\n"),
    ],
)
def test_zizmor_sees_what_must_never_be_in_a_workflow(rule: str, before: str, after: str, tmp_path: Path) -> None:
    """That no file has such a fault, `make lint` checks; this checks what the rules in force cover."""
    text = (WORKFLOWS / "pipeline.yml").read_text()
    assert before in text
    shutil.copy(REPOSITORY / ".github" / "zizmor.yml", tmp_path)
    (tmp_path / "pipeline.yml").write_text(text.replace(before, after))
    command = [
        str(Path(sys.executable).with_name("zizmor")),
        "--offline",
        "--persona",
        "pedantic",
        "--format",
        "json",
        "--config",
        "zizmor.yml",
        "pipeline.yml",
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert {finding["ident"] for finding in json.loads(found.stdout)} == {rule}


def test_a_secret_is_given_to_single_steps_of_the_deploy_job_only() -> None:
    given = [
        (path.name, name, secret)
        for path in FILES
        for name, job in read(path)["jobs"].items()
        for step in job.get("steps", [])
        for secret in re.findall(r"secrets\.(\w+)", str(step.get("env", "")))
    ]
    assert given == [("pipeline.yml", "deploy", "RENDER_API_KEY"), ("pipeline.yml", "deploy", "NOTIFY_URL")]
    assert sum(path.read_text().count("secrets.") for path in FILES) == len(given)


def test_only_the_main_branch_is_deployed_and_only_what_is_no_pull_request_is_pushed() -> None:
    jobs = read(WORKFLOWS / "pipeline.yml")["jobs"]
    assert "github.ref == 'refs/heads/main'" in jobs["deploy"]["if"]
    assert "always()" not in jobs["deploy"]["if"], "a job that was refused is followed by none"
    for step in jobs["test-and-build"]["steps"]:
        pushes = step.get("with", {}).get("push") or re.search("login-action|attest", step.get("uses", ""))
        assert not pushes or step["if"] == "github.event_name != 'pull_request'"


def test_the_image_is_scanned_and_every_pinned_package_audited() -> None:
    steps = read(WORKFLOWS / "pipeline.yml")["jobs"]["security"]["steps"]
    trivy = next(step["with"] for step in steps if "trivy" in step.get("uses", ""))
    assert (trivy["severity"], trivy["ignore-unfixed"], trivy["exit-code"]) == ("HIGH,CRITICAL", True, "1")
    audit = next(step["run"] for step in steps if "pip-audit" in step.get("run", ""))
    assert "--strict" in audit
    assert "-r constraints.txt" in audit


@pytest.mark.parametrize(("place", "step"), [pair for pair in _steps() if "run" in pair[1]])
def test_every_step_is_a_script_that_bash_understands(place: str, step: dict[str, Any]) -> None:
    parsed = subprocess.run(["bash", "-n"], input=step["run"], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, f"{place}: {parsed.stderr}"
    for target in re.findall(r"^\s*make (.*)$", step["run"], flags=re.MULTILINE):
        named = ["make", "--dry-run", *target.split()]
        assert subprocess.run(named, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0
