"""One comment a pull request: written once, replaced afterwards, and nobody else's words are touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.gate.comment import LONGEST, PAGE, main
from experiments.gate.render import MARK
from tests.json_server import Asked, PullRequest, json_server


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "gate.md"
    path.write_text(f"{MARK}\n### Model gate: PASS\n")
    return path


@pytest.fixture
def github() -> Iterator[tuple[PullRequest, list[Asked], dict[str, str]]]:
    pull_request = PullRequest()
    with json_server(pull_request.answer) as (address, seen):
        yield (
            pull_request,
            seen,
            {
                "GITHUB_API_URL": address,
                "GITHUB_REPOSITORY": "someone/write-me-a-story",
                "GITHUB_TOKEN": "right",
                "PULL_REQUEST": "7",
            },
        )


Github = tuple[PullRequest, list[Asked], dict[str, str]]


def test_a_second_verdict_takes_the_place_of_the_first(report: Path, github: Github, tmp_path: Path) -> None:
    pull_request, seen, environment = github
    for number in range(2 * PAGE + 1):
        pull_request.add(f"comment {number}")
    pull_request.add(f"{MARK}\nis what a user quotes")
    assert main([str(report)], environment) == 0
    written = pull_request.comments[-1]
    assert written["body"] == report.read_text()
    report.write_text(f"{MARK}\n### Model gate: FAIL\n")
    (tmp_path / "benchmark.md").write_text("# Figures\n")
    assert main([str(report), "--details", str(tmp_path / "benchmark.md")], environment) == 0
    assert written["body"].startswith(f"{MARK}\n### Model gate: FAIL\n")
    assert "<details>" in written["body"]
    assert "# Figures" in written["body"]
    assert len(pull_request.comments) == 2 * PAGE + 3
    assert pull_request.comments[-2]["body"].endswith("is what a user quotes")
    before = [asked.method for asked in seen].count("PATCH")
    assert main([str(report), "--details", str(tmp_path / "benchmark.md")], environment) == 0
    assert [asked.method for asked in seen].count("PATCH") == before, "an equal verdict notifies nobody"


def test_a_report_that_is_too_long_is_truncated_and_says_so(report: Path, github: Github) -> None:
    pull_request, _, environment = github
    report.write_text(f"{MARK}\n" + "x" * 100_000)
    assert main([str(report)], environment) == 0
    body = pull_request.comments[0]["body"]
    assert len(body) == LONGEST
    assert "truncated" in body[-200:]


def test_without_a_pull_request_nothing_is_asked(report: Path, github: Github) -> None:
    _, seen, environment = github
    assert main([str(report)], environment | {"PULL_REQUEST": ""}) == 0
    assert seen == []


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"GITHUB_TOKEN": "wrong-secret"}, 1, "GitHub answered 401"),
        ({"GITHUB_API_URL": "http://127.0.0.1:9"}, 1, "GitHub did not answer"),
        ({"PULL_REQUEST": "seven"}, 2, "must be a number"),
        ({"GITHUB_TOKEN": None}, 2, "GITHUB_TOKEN is not set"),
    ],
)
def test_what_goes_wrong_is_one_line_without_the_token(
    change: dict[str, str | None],
    code: int,
    said: str,
    report: Path,
    github: Github,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {name: value for name, value in (github[2] | change).items() if value is not None}
    assert main([str(report)], environment) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "wrong-secret" not in error


def test_a_report_without_a_mark_could_never_be_found_again(report: Path, github: Github) -> None:
    report.write_text("### Model gate\n")
    assert main([str(report)], github[2]) == 1
    assert github[0].comments == []
    assert main([str(report.with_name("missing.md"))], github[2]) == 1


def test_it_runs_where_nothing_is_installed(repository: Path, report: Path) -> None:
    """The job with the right to write installs nothing: -S leaves even site-packages out."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "experiments.gate.comment", str(report)],
        cwd=repository,
        env={"PULL_REQUEST": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "no pull request, so no comment\n")
