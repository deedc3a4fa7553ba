"""`story ab` as it is typed: exit codes, JSON, what it logs to a real MLflow store, and what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import story
from experiments.ab.database import connect, migrate, store
from tests.experiments.ab.events import readers
from training.tracking.store import database_file, open_store


def run(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["ab", *arguments])


@pytest.fixture
def told() -> None:
    """A store where the challenger is liked better, in the place where the demo would make it."""
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    store(engine, list(readers(300, {"champion": 0.3, "challenger": 0.8})))


@pytest.mark.usefixtures("told")
def test_exit_codes_follow_the_verdict() -> None:
    assert run("--no-track").exit_code == 0
    assert run("--no-track", "--metric", "failed").exit_code == 3
    engine = connect("sqlite:///stories.db", writes=True)
    store(engine, list(readers(300, {"champion": 0.8, "challenger": 0.3}, test="other")))
    assert run("--no-track").exit_code == 1, "the newest test is the default"
    assert run("--no-track", "--test", "t").exit_code == 0


@pytest.mark.usefixtures("told")
def test_a_look_is_logged_to_mlflow_with_its_figures_and_report(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["verdict"], told["test"]) == ("better", "t")
    assert set(told["logged"]) == {"run_id", "experiment"}
    logged = open_store(tracking_uri).get_run(told["logged"]["run_id"])
    assert logged.data.tags["ab.verdict"] == "better"
    assert logged.data.tags["challenger.digest"] == "d" * 64
    assert logged.data.params["split"] == "champion:1,challenger:1"
    rates = {arm["arm"]: arm["rates"]["like"]["value"] for arm in told["arms"]}
    assert logged.data.metrics["challenger/like"] == rates["challenger"] > 0.6
    assert logged.data.metrics["challenger/like_difference_low"] > 0
    database = database_file(tracking_uri)
    assert database is not None
    report = database.parent / "mlartifacts/story-ab" / told["logged"]["run_id"] / "artifacts/report.json"
    assert json.loads(report.read_text("utf-8"))["verdict"] == "better"


@pytest.mark.usefixtures("told")
def test_a_store_of_runs_that_cannot_be_had_spoils_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    result = run()
    assert result.exit_code == 0
    assert "BETTER: challenger is better than champion" in result.stdout
    assert result.stderr.startswith("not logged: MLFLOW_TRACKING_URI")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "soon"], "story: since must be a day"),
        (["--alpha", "2"], "story: alpha must be above 0 and below 1, got 2"),
        (["--test", "spring"], "story: test 'spring' has no stories; there is t (300 stories)"),
    ],
)
@pytest.mark.usefixtures("told")
def test_bad_use_is_one_line(arguments: list[str], said: str) -> None:
    result = run("--no-track", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_without_a_store_it_says_who_makes_one_and_makes_none() -> None:
    result = run()
    assert (result.exit_code, result.stderr) == (
        2, "story: DATABASE_URL names stories.db, which does not exist; `story demo` makes it\n"
    )  # fmt: skip
    assert not Path("stories.db").exists()


def test_a_file_that_is_no_database_is_one_line() -> None:
    Path("stories.db").write_text("Once upon a time, there was a text that was no database at all." * 20)
    result = run("--no-track")
    assert result.exit_code == 2
    assert result.stderr.startswith("story: DATABASE_URL sqlite:///stories.db cannot be used (")
    assert result.stderr.count("\n") == 1
