"""`story ab` as it is typed: exit codes, JSON, the run in a real MLflow store, errors of one line, and `--since`."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import story
from experiments.ab.store import connect, insert_events, migrate
from experiments.users_cli import parse_since
from model.errors import InputError
from tests.experiments.ab.events import users
from training.tracking.store import database_file, open_store


def run(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["ab", *arguments])


@pytest.fixture
def database() -> None:
    """A database where the challenger is liked better, where the demo would create it."""
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    insert_events(engine, list(users(300, {"champion": 0.3, "challenger": 0.8})))


@pytest.mark.usefixtures("database")
def test_exit_codes_follow_the_verdict() -> None:
    assert run("--no-track").exit_code == 0
    assert run("--no-track", "--metric", "failed").exit_code == 3
    engine = connect("sqlite:///stories.db", writes=True)
    insert_events(engine, list(users(300, {"champion": 0.8, "challenger": 0.3}, test="other")))
    assert run("--no-track").exit_code == 1, "the newest test is the default"
    assert run("--no-track", "--test", "t").exit_code == 0


@pytest.mark.usefixtures("database")
def test_a_look_is_logged_to_mlflow_with_its_figures_and_report(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    result = run("--json")
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["verdict"], shown["test"]) == ("better", "t")
    assert set(shown["logged"]) == {"run_id", "experiment"}
    logged = open_store(tracking_uri).get_run(shown["logged"]["run_id"])
    assert logged.data.tags["ab.verdict"] == "better"
    assert logged.data.tags["challenger.digest"] == "d" * 64
    assert logged.data.params["split"] == "champion:1,challenger:1"
    rates = {each["variant"]: each["rates"]["like"]["value"] for each in shown["variants"]}
    assert logged.data.metrics["challenger/like"] == rates["challenger"] > 0.6
    assert logged.data.metrics["challenger/like_difference_low"] > 0
    database = database_file(tracking_uri)
    assert database is not None
    report = database.parent / "mlartifacts/story-ab" / shown["logged"]["run_id"] / "artifacts/report.json"
    assert json.loads(report.read_text("utf-8"))["verdict"] == "better"


@pytest.mark.usefixtures("database")
def test_an_unusable_mlflow_store_does_not_stop_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
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
@pytest.mark.usefixtures("database")
def test_bad_use_is_one_line(arguments: list[str], said: str) -> None:
    result = run("--no-track", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


def test_a_missing_database_is_one_line_and_is_not_created() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stderr == "story: DATABASE_URL names stories.db, which does not exist; `story demo` creates it\n"
    assert not Path("stories.db").exists()


def test_a_file_that_is_no_database_is_one_line() -> None:
    Path("stories.db").write_text("Once upon a time, there was a text that was no database at all." * 20)
    result = run("--no-track")
    assert result.exit_code == 2
    assert result.stderr.startswith("story: DATABASE_URL sqlite:///stories.db cannot be used (")
    assert result.stderr.count("\n") == 1


NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-03", datetime(2026, 11, 3, tzinfo=UTC)),
        ("2026-11-03T08:00", datetime(2026, 11, 3, 8, tzinfo=UTC)),
        ("2026-11-03T08:00+02:00", datetime(2026, 11, 3, 6, tzinfo=UTC)),
        ("90m", NOW - timedelta(minutes=90)),
        ("12h", NOW - timedelta(hours=12)),
        ("2w", NOW - timedelta(days=14)),
    ],
)
def test_since_is_a_day_a_time_or_how_long_ago(text: str, moment: datetime) -> None:
    assert parse_since(text, NOW) == moment.timestamp()


@given(st.text(max_size=30))
def test_any_other_since_is_one_line_that_says_what_is_allowed(text: str) -> None:
    said = ""
    try:
        parse_since(text, NOW)
    except InputError as error:
        said = str(error)
    assert not said or said.startswith("since must be a day (2026-11-03), a time")
    assert "\n" not in said
