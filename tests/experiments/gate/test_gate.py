"""The gate against a real store: a challenger that is worse is refused, and for the right reason."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from mlflow import MlflowClient
from rich.console import Console

from experiments.common.statistics import ONE_SIDED, wilson
from experiments.common.thresholds import load_thresholds
from experiments.gate.decide import Decision, Evidence, Verdict, decide, save_champion
from experiments.gate.run import MARK, PromotionError, junit, markdown, print_decision, promote, rollback, run_gate
from experiments.quality.evidence import QualityEvidence, StoryLoss
from experiments.registry.versions import register, versions
from model.architecture.folder import ModelFolder
from model.errors import InputError
from tests.experiments.gate.promoted import Place
from tests.experiments.gate.worse import log_quality, log_speed, noised
from training.tracking.store import open_store


def verdicts(decision: Decision) -> dict[str, Verdict]:
    return {check.threshold.metric: check.verdict for check in decision.checks}


def why(decision: Decision, metric: str) -> str:
    return next(check.why for check in decision.checks if check.threshold.metric == metric)


def measured(place: Place, folder: ModelFolder, *, failing: bool = False) -> Decision:
    log_speed(place.uri, folder, place.bounds, against=place.champion, failing=failing)
    return run_gate(place.uri, place.bounds)


def aliases(uri: str) -> dict[str, int]:
    return {alias: each.number for each in versions(uri) for alias in each.aliases}


def test_a_challenger_as_good_as_the_champion_passes_and_takes_its_place_and_gives_it_back(place: Place) -> None:
    decision = measured(place, place.challenger)
    assert decision.verdict == "pass", decision.as_dict()
    assert (decision.version, decision.champion) == (2, place.champion.digest)
    dry = promote(place.uri, place.bounds)
    assert (dry.applied, aliases(place.uri)) == (False, {"champion": 1, "challenger": 2})
    assert promote(place.uri, place.bounds, apply=True).champion_before == 1
    assert aliases(place.uri) == {"champion": 2, "previous": 1}
    tags = open_store(place.uri).get_model_version("story-writer", "2").tags
    assert (tags["gate"], tags["gate.run_id"]) == ("pass", decision.run_id)
    assert tags["thresholds.digest"] == place.bounds.digest
    assert rollback(place.uri).version == 1
    assert aliases(place.uri) == {"champion": 1, "previous": 2}
    moves = [run.data.tags["action"] for run in _moves(place.uri)]
    assert moves == ["rollback", "promote", "promote"], "each move is logged"


def _moves(uri: str) -> list[Any]:
    client = open_store(uri)
    experiment = client.get_experiment_by_name("story-gate")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], "tags.action != ''", order_by=["start_time DESC"]))


def test_noised_weights_are_refused_for_their_bits_per_byte(place: Place, tmp_path: Path) -> None:
    worse = noised(tmp_path, strength=0.3)
    register(worse, place.uri)
    log_quality(place.uri, worse, place.stories)
    decision = measured(place, worse)
    assert (decision.verdict, decision.exit_code) == ("fail", 1)
    failed = {name for name, verdict in verdicts(decision).items() if verdict == "fail"}
    assert failed == {"bits_per_byte_difference"}
    with pytest.raises(PromotionError, match="verdict on version 3 is fail") as refused:
        promote(place.uri, place.bounds, apply=True)
    assert refused.value.exit_code == 1
    assert aliases(place.uri)["champion"] == 1


def test_a_delay_in_decoding_is_refused_for_its_times(place: Place) -> None:
    log_speed(place.uri, place.challenger, place.bounds, against=place.champion, delay=0.16)
    found = verdicts(run_gate(place.uri, place.bounds))
    assert {name for name, verdict in found.items() if verdict == "fail"} == {
        "avg_generation_time",
        "generation_time_ratio",
    }
    assert found["bits_per_byte_difference"] == "pass"


def test_one_failing_request_in_three_is_refused_for_the_share_that_came_whole(place: Place) -> None:
    decision = measured(place, place.challenger, failing=True)
    assert verdicts(decision)["success_rate"] == "fail"
    assert verdicts(decision)["bits_per_byte"] == "pass"
    assert decision.verdict == "fail"


def test_with_half_the_evidence_deleted_nothing_is_decided(place: Place) -> None:
    run = log_speed(place.uri, place.challenger, place.bounds, against=place.champion)
    client = open_store(place.uri)
    client.delete_run(run)
    decision = run_gate(place.uri, place.bounds)
    assert (decision.verdict, decision.exit_code) == ("undecided", 3)
    assert "no such benchmark of this artifact" in why(decision, "success_rate")
    assert verdicts(decision)["bits_per_byte_difference"] == "pass", "what is there still counts"
    with pytest.raises(PromotionError, match="undecided, not pass") as refused:
        promote(place.uri, place.bounds, apply=True)
    assert refused.value.exit_code == 3


def test_rows_that_were_cut_out_of_the_evidence_are_noticed(place: Place) -> None:
    import pandas

    run = log_speed(place.uri, place.challenger, place.bounds, against=place.champion)
    client = open_store(place.uri)
    kept = Path(client.get_run(run).info.artifact_uri) / "samples.parquet"
    rows = pandas.read_parquet(kept)
    for lost, metric in (("compare", "generation_time_ratio"), ("open", "success_rate")):
        rows[rows.phase != lost].to_parquet(kept, index=False)
        decision = run_gate(place.uri, place.bounds)
        assert decision.verdict == "undecided"
        assert "follow from its rows" in why(decision, metric)


def test_evidence_of_another_digest_counts_for_nothing(place: Place, tmp_path: Path) -> None:
    measured(place, place.challenger)
    other = noised(tmp_path, strength=2e-4)
    register(other, place.uri)
    decision = run_gate(place.uri, place.bounds)
    assert decision.version == 3
    assert set(verdicts(decision).values()) == {"undecided"}
    assert f"no evaluation of {other.digest[:12]}" in why(decision, "bits_per_byte")


def test_evidence_tagged_for_a_digest_that_it_was_not_measured_on_is_noticed(place: Place, tmp_path: Path) -> None:
    other = noised(tmp_path, strength=2e-4)
    register(other, place.uri)
    run = log_speed(place.uri, place.challenger, place.bounds)
    open_store(place.uri).set_tag(run, "artifact.digest", other.digest)
    assert "is tagged for" in why(run_gate(place.uri, place.bounds), "success_rate")


def test_evidence_from_too_long_ago_decides_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.gate.decide.MAX_AGE", timedelta(0))
    assert "is 0 days old" in why(run_gate(place.uri, place.bounds), "bits_per_byte")


def test_a_verdict_by_other_thresholds_promotes_nothing(place: Place, tmp_path: Path) -> None:
    import dataclasses

    measured(place, place.challenger)
    with pytest.raises(PromotionError, match="judged by other thresholds"):
        promote(place.uri, dataclasses.replace(place.bounds, digest="0" * 64), apply=True)


def test_an_alias_that_does_not_read_back_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(place, place.challenger)
    # Stands in for another process that moves the alias at the same moment.
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *arguments: None)
    with pytest.raises(PromotionError, match="champion does not read back as version 2") as refused:
        promote(place.uri, place.bounds, apply=True)
    assert refused.value.exit_code == 1


def test_a_ci_job_gates_against_a_file_without_a_champion_in_the_store(place: Place, tmp_path: Path) -> None:
    evidence = QualityEvidence.newest(place.uri, place.champion.digest)
    assert evidence is not None
    save_champion(evidence, tmp_path / "champion.json")
    empty = f"sqlite:///{tmp_path}/other.db"
    log_quality(empty, place.challenger, place.stories)
    log_speed(empty, place.challenger, place.bounds)
    decision = run_gate(empty, place.bounds, digest=place.challenger.digest, against_file=tmp_path / "champion.json")
    assert verdicts(decision)["bits_per_byte_difference"] == "pass"
    assert decision.verdict == "pass"
    assert "generation_time_ratio: the champion is a file" in decision.notes[0]
    log_speed(empty, place.challenger, place.bounds, against=place.champion)
    beside = run_gate(empty, place.bounds, digest=place.challenger.digest, against_file=tmp_path / "champion.json")
    assert verdicts(beside)["generation_time_ratio"] == "pass", "asked in turn in this very store, speed counts"
    assert (beside.verdict, beside.notes) == ("pass", ())
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="against-file"):
        run_gate(empty, place.bounds, digest="0" * 64, against_file=tmp_path / "bad.json")


WRITTEN = """
thresholds:
  - {metric: written/ended, unit: share, at_least: 0.70, scope: quality, reason: a story ends, min_n: 50}
  - {metric: written/looping, unit: share, at_most: 0.05, scope: quality, reason: no circles, min_n: 50}
  - {metric: written/repeated_4, unit: share, at_most: 0.5, scope: quality, reason: few repeats}
  - {metric: written/copied_words_max, unit: words, at_most: 5, scope: quality, reason: nothing by heart}
  - {metric: written/names_kept, unit: share, at_least: 0.5, scope: quality, reason: names come again}
"""


def test_written_stories_are_judged_by_their_rows_a_prompt_counting_once(tmp_path: Path) -> None:
    (tmp_path / "written.yaml").write_text(WRITTEN)
    bounds = load_thresholds(tmp_path / "written.yaml")
    rows = tuple(
        {
            "number": number,
            "seed": seed,
            "ended": float(number % 16 > 0),
            "looping": 0.0,
            "repeated_4": 0.01 * (number % 7),
            "copied_words": 3 + (number == 5 and seed == 1),
            "names_kept": None,
        }
        for number in range(64)
        for seed in range(3)
    )
    loss = StoryLoss(id="0", nats=1.0, tokens=1, bytes=1)
    quality = QualityEvidence(
        run_id="run", digest="0" * 64, began=datetime.now(UTC), tags={}, metrics={}, losses=(loss,), stories=rows
    )
    evidence = Evidence(digest="0" * 64, quality=quality, benchmark="none")
    decision = decide(evidence, bounds)
    found = {check.threshold.metric: check for check in decision.checks}
    assert {name: check.verdict for name, check in found.items()} == {
        "written/ended": "pass",
        "written/looping": "pass",
        "written/repeated_4": "pass",
        "written/copied_words_max": "pass",
        "written/names_kept": "undecided",
    }
    looping, ended, copied = (found[f"written/{name}"].bounds for name in ("looping", "ended", "copied_words_max"))
    assert looping is not None
    assert ended is not None
    assert copied is not None
    assert looping.high == pytest.approx(wilson(0, 64, level=ONE_SIDED).high), (
        "three stories of a prompt that agree are one answer"
    )
    assert ended.value == pytest.approx(60 / 64)
    assert ended.n == 192
    assert ended.low == pytest.approx(wilson(60, 64, level=ONE_SIDED).low, abs=0.03), (
        "a bootstrap against the score test"
    )
    assert copied.value == 4
    without = decide(
        Evidence(digest="0" * 64, benchmark="none", quality=quality.model_copy(update={"stories": ()})), bounds
    )
    assert {check.verdict for check in without.checks} == {"undecided"}


def test_a_decision_reads_well_everywhere(place: Place) -> None:
    decision = run_gate(place.uri, place.bounds)
    page = markdown(decision)
    assert page.startswith(MARK), "the comment that is replaced is found by its first line"
    assert "Model gate: UNDECIDED" in page
    assert page.count("\n| ") == 2 + len(decision.checks) - 1 + 1
    shown = io.StringIO()
    print_decision(decision, Console(file=shown, width=200))
    assert "UNDECIDED: version 2" in shown.getvalue()
    narrow = io.StringIO()
    print_decision(decision, Console(file=narrow, width=80))
    parts = narrow.getvalue().split("\n\n")
    for part in parts:
        rows = part.splitlines()[1 : len(decision.checks) + 1]
        assert [row.split()[1] for row in rows] == [check.threshold.metric for check in decision.checks]
        assert all(len(row) <= 80 for row in rows)
    assert "95 % bounds" in narrow.getvalue()
    suite = ElementTree.fromstring(junit(decision)).find("testsuite")
    assert suite is not None
    counted = [check.verdict for check in decision.checks]
    assert int(suite.get("errors", "")) == counted.count("undecided") == len(suite.findall("*/error"))
    kept = Path(open_store(place.uri).get_run(str(decision.run_id)).info.artifact_uri)
    assert json.loads((kept / "decision.json").read_text())["verdict"] == "undecided"
    assert (kept / "decision.md").read_text() == page
