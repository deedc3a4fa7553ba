"""`story arena` as it is typed, and its evidence as the gate reads it: a real database and a real MLflow store."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import story
from experiments.ab.events import Vote
from experiments.ab.store import connect, insert_events, migrate
from experiments.arena.report import METRIC, ArenaEvidence, between_versions
from experiments.arena.votes import tally
from experiments.common.evidence_runs import EvidenceError
from experiments.common.thresholds import Thresholds, load_thresholds
from experiments.gate.decide import decide, gather
from tests.experiments.arena.made import DIGESTS, vote, votes
from training.tracking.store import open_store

NEW, OLD = DIGESTS["new"], DIGESTS["old"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["arena", *arguments])


def stored(made: Iterable[Vote]) -> None:
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    insert_events(engine, list(made))


@pytest.fixture
def bounds(tmp_path: Path) -> Thresholds:
    path = tmp_path / "thresholds.yaml"
    entry = "{metric: arena_win_rate, unit: share, at_least: 0.5, scope: compare, reason: liked at least as well}"
    path.write_text(f"thresholds:\n  - {entry}\n")
    return load_thresholds(path)


def test_the_table_is_sorted_by_the_lower_bound_and_says_what_was_left_out() -> None:
    stored([*votes(60, won=0.9), vote(fault="too fast"), vote("old", "old", "first", user="rose")])
    result = run("--no-track")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["new", "old"]
    assert "Not counted, too fast: 1." in lines
    text = " ".join(result.stdout.split())
    assert "Of 1 decided battles of a contestant with itself, the left story won 100.0 % (21 to 100)." in text
    assert "DECIDED: new is preferred to the other in" in text


def test_too_few_battles_decide_nothing_and_none_is_an_error() -> None:
    assert "does not exist" in run("--no-track").stderr
    stored([vote(fault="too fast")])
    assert "holds no votes that count (too fast: 1)" in run("--no-track").stderr
    stored(votes(10, won=1.0))
    result = run("--no-track", "--json")
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    assert (shown["verdict"], shown["battles"], shown["left_out"]) == ("undecided", 10, {"too fast": 1})
    assert "fewer than 20 mean nothing yet" in shown["why"]
    assert {each["meaningful"] for each in shown["contestants"]} == {False}


def test_logged_votes_are_evidence_by_digest_that_the_gate_judges(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, bounds: Thresholds
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    before = gather(tracking_uri, NEW, champion=OLD, arena=True)
    (missing,) = decide(before, bounds).checks
    assert (missing.verdict, missing.why.startswith("no votes between this artifact")) == ("undecided", True)
    stored(votes(80, won=0.85))
    logged = json.loads(run("--json").stdout)["logged"]
    assert {(each["digest"], each["against"]) for each in logged["evidence"]} == {(NEW, OLD), (OLD, NEW)}
    verdicts = {}
    for digest, champion in ((NEW, OLD), (OLD, NEW)):
        evidence = gather(tracking_uri, digest, champion=champion, arena=True)
        (check,) = decide(evidence, bounds).checks
        verdicts[digest] = check.verdict
        assert isinstance(evidence.arena, ArenaEvidence)
        wins = sum(
            (row.first_digest == digest) == (row.choice == "first") for row in evidence.arena.votes
        )  # nobody was undecided
        assert check.bounds is not None
        assert check.bounds.value == pytest.approx(wins / 80)
        metrics = open_store(tracking_uri).get_run(evidence.arena.run_id).data.metrics
        assert metrics[METRIC] == check.bounds.value
    assert verdicts == {NEW: "pass", OLD: "fail"}


def test_evidence_whose_votes_were_changed_is_none(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    stored(votes(30, won=0.8))
    logged = json.loads(run("--json").stdout)["logged"]
    (of_new,) = [each for each in logged["evidence"] if each["digest"] == NEW]
    client = open_store(tracking_uri)
    client.log_text(of_new["run_id"], "[]", "votes.json")
    with pytest.raises(EvidenceError, match=r"votes\.json is not the file that was logged"):
        ArenaEvidence.newest(tracking_uri, NEW)


def test_only_votes_between_versions_with_the_same_settings_are_evidence() -> None:
    counted = tally(
        [
            vote(),
            vote(user="rose", settings=("temperature=0.85", "temperature=1")),
            vote("old", "old", user="ann"),
            replace(vote(user="tom"), fault="too fast"),
        ]
    )
    assert {pair: len(rows) for pair, rows in between_versions(counted).items()} == {(OLD, NEW): 1, (NEW, OLD): 1}
