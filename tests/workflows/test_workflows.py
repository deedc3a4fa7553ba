"""The workflows: valid by the public schemas, in the documented order, and with no more rights than they need."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workflows.workflow import EXPRESSION, REPOSITORY, WORKFLOWS, read

FILES = sorted(WORKFLOWS.glob("*.yml"))
ACTIONS = sorted((REPOSITORY / ".github" / "actions").rglob("action.yml"))
JOBS = [(path.name, name, job) for path in FILES for name, job in read(path)["jobs"].items()]
ORDER = ["lint", "test-and-build", "security", "validate-model", "deploy"]
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def _schema(name: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", name, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _steps() -> list[tuple[str, dict[str, Any]]]:
    found = [(f"{file} {name}", step) for file, name, job in JOBS for step in job.get("steps", [])]
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


@pytest.mark.parametrize(("file", "name", "job"), JOBS, ids=[f"{file}-{name}" for file, name, _ in JOBS])
def test_every_job_ends_in_time_and_says_which_rights_it_has(
    file: str, name: str, job: dict[str, Any]
) -> None:
    assert isinstance(job["permissions"], dict)
    writes = {right for right, how in job["permissions"].items() if how == "write"}
    allowed = {
        "test-and-build": {"packages", "id-token", "attestations"},
        "comment": {"pull-requests"},
        "validate-model": {"pull-requests"} if "uses" in job else set(),
    }
    assert writes <= allowed.get(name, set())
    if "uses" in job:  # the called workflow's own jobs have the time limits
        assert (REPOSITORY / job["uses"]).is_file()
    else:
        assert 0 < job["timeout-minutes"] <= 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow_has_no_rights_beside_those_of_its_jobs(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {}
    assert "pull_request_target" not in workflow["on"], (
        "a fork's code never runs with this repository's secrets"
    )
    assert "workflow_run" not in workflow["on"]


def test_nothing_that_somebody_else_may_change_is_used() -> None:
    used = [(place, step["uses"]) for place, step in _steps() if "uses" in step]
    assert len(used) > 10
    loose = [
        (place, name)
        for place, name in used
        if not name.startswith("./.github/") and not PINNED.fullmatch(name)
    ]
    assert loose == [], "pin by the full commit"
    for path in (*FILES, *ACTIONS):
        for line in path.read_text().splitlines():
            if "uses:" in line and "./.github/" not in line:
                assert re.search(r"# v\d+\.\d+\.\d+$", line), (
                    f"name the version beside the commit: {line.strip()}"
                )


def test_one_action_has_one_version() -> None:
    used = {step["uses"].rpartition("@")[::2] for _, step in _steps() if "@" in step.get("uses", "")}
    assert len({name for name, _ in used}) == len(used)


def test_no_text_of_a_stranger_and_no_secret_reaches_a_shell() -> None:
    for place, step in _steps():
        found = EXPRESSION.findall(step.get("run", ""))
        assert found == [], f"{place}: hand {found} over as a variable of the environment"


def test_a_secret_is_known_to_the_one_step_that_needs_it() -> None:
    known: dict[str, list[str]] = {}
    for path in FILES:
        workflow = read(path)
        assert "secrets." not in str(workflow.get("env", ""))
        for name, job in workflow["jobs"].items():
            rest = {key: value for key, value in job.items() if key != "steps"}
            assert "secrets." not in str(rest), f"{name}: not for a whole job"
            assert job.get("secrets") != "inherit"
            for step in job.get("steps", []):
                for secret in re.findall(r"secrets\.(\w+)", str(step)):
                    assert step["env"][secret] == f"${{{{ secrets.{secret} }}}}"
                    assert not re.search(rf"\becho\b.*{secret}|set -x", step["run"])
                    known.setdefault(secret, []).append(name)
    assert known == {"RENDER_API_KEY": ["deploy"], "NOTIFY_URL": ["deploy"]}


def test_a_checkout_leaves_no_token_behind() -> None:
    checkouts = [step for _, step in _steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


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
