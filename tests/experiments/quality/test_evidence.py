"""Evidence in a real MLflow store: what was logged is what comes back, and nothing else passes for it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.common.evidence_runs import DIGEST, EvidenceError, EvidenceStore
from experiments.quality.evidence import (
    BASELINE,
    EXPERIMENT,
    LOSSES,
    RARE_NAMES,
    STORIES,
    QualityEvidence,
    _loss_rows,
    _metrics,
    _params,
    _tags,
    log_evaluation,
)
from experiments.quality.generation import prompts_digest
from experiments.quality.held_out import figures_of
from experiments.quality.judge import Judged, Judgement
from model.errors import InputError
from tests.experiments.quality.reports import DIGEST as DIGEST_OF_REPORT
from tests.experiments.quality.reports import HELD_OUT, PROMPTS, report, written
from training.tracking.store import OWNER, Owner, open_store


def log(uri: str, **changes: Any) -> str:
    return log_evaluation(report(**changes), EvidenceStore(uri, EXPERIMENT))


def artifact_folder(uri: str, run_id: str) -> Path:
    return Path(open_store(uri).get_run(run_id).info.artifact_uri)


def test_what_was_logged_comes_back_story_by_story(tracking_uri: str) -> None:
    run_id = log(tracking_uri)
    evidence = QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT)
    assert evidence is not None
    logged = report()
    assert (evidence.run_id, evidence.digest) == (run_id, DIGEST_OF_REPORT)
    assert [loss.id for loss in evidence.losses] == HELD_OUT.ids
    assert [loss.nats for loss in evidence.losses] == pytest.approx([6.5, 5.0])
    assert [(loss.tokens, loss.bytes) for loss in evidence.losses] == [(4, 10), (3, 15)]
    bits = sum(loss.nats for loss in evidence.losses) / math.log(2) / sum(loss.bytes for loss in evidence.losses)
    assert bits == pytest.approx(evidence.metrics["bits_per_byte"]) == pytest.approx(logged.served.bits_per_byte)
    assert [(row["number"], row["seed"], row["text"]) for row in evidence.stories] == [
        (story.number, story.seed, story.text) for story in (logged.written.stories if logged.written else ())
    ]
    rare = [row["kept"] for row in evidence.rare_names]
    assert sum(rare) / len(rare) == evidence.metrics["rare_names/kept"]
    kept = [row["names_kept"] for row in evidence.stories]
    assert sum(kept) / len(kept) == evidence.metrics["written/names_kept"]
    assert evidence.began.timestamp() > 0


def test_the_run_says_whose_evidence_it_is_and_what_it_rests_on(tracking_uri: str) -> None:
    run = open_store(tracking_uri).get_run(log(tracking_uri))
    tags, params = run.data.tags, run.data.params
    assert tags[DIGEST] == DIGEST_OF_REPORT
    assert tags["data.digest"] == params["data.digest"] == HELD_OUT.digest
    assert tags["skipped.judge"] == "no judge was named"
    assert tags["skipped.torch"] == "it is not installed"
    assert tags.get("git.sha", "unknown") == params["git.sha"]
    assert (params["runtime"], params["seeds"], params["sampling.temperature"]) == ("int8", "[0, 1]", "0.85")
    assert params["prompts.digest"] == prompts_digest(PROMPTS)
    assert (params["model"], params["data.files"]) == ("tale", "held-out.jsonl"), "no folder of a machine"
    assert run.info.status == "FINISHED"
    assert open_store(tracking_uri).get_experiment(run.info.experiment_id).name == EXPERIMENT
    files = {path.name for path in artifact_folder(tracking_uri, run.info.run_id).rglob("*.json")}
    assert files >= {Path(name).name for name in (LOSSES, STORIES, BASELINE)}


def test_loss_by_place_is_a_curve_with_the_baselines_beside(tracking_uri: str) -> None:
    client, run_id = open_store(tracking_uri), log(tracking_uri)
    for key, attribute in (("loss_by_place", "loss"), ("baseline/loss_by_place", "baseline_loss")):
        curve = {one.step: one.value for one in client.get_metric_history(run_id, key)}
        assert curve == {place.first: getattr(place, attribute) for place in report().places}


def test_the_newest_finished_run_of_the_digest_counts(tracking_uri: str) -> None:
    log(tracking_uri, scale=2.0)
    newest = log(tracking_uri)
    log(tracking_uri, scale=3.0, digest="b" * 64)
    failed = log(tracking_uri, scale=4.0)
    open_store(tracking_uri).set_terminated(failed, "FAILED")
    evidence = QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT)
    assert evidence is not None
    assert evidence.run_id == newest


def test_no_evidence_is_none_and_not_an_error(tracking_uri: str) -> None:
    assert QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT) is None
    log(tracking_uri)
    assert QualityEvidence.newest(tracking_uri, "c" * 64) is None
    assert QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT, {"data.digest": "d" * 64}) is None
    assert QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT, {"data.digest": HELD_OUT.digest}) is not None


def test_mlflow_reads_the_tables_as_its_own(tracking_uri: str) -> None:
    client, run_id = open_store(tracking_uri), log(tracking_uri)
    experiment = client.get_run(run_id).info.experiment_id
    for path, rows in ((LOSSES, _loss_rows(report())), (STORIES, written().rows())):
        table = client.load_table(experiment, path, [run_id])
        assert list(table.columns) == list(rows[0])
        for name in ("id", "nats", "text", "names_kept"):
            if name in rows[0]:
                assert table[name].tolist() == [row[name] for row in rows]
    listed = {entry["path"] for entry in json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])}
    assert listed == {LOSSES, STORIES, BASELINE, RARE_NAMES}


@pytest.mark.parametrize("path", [LOSSES, STORIES])
def test_a_run_without_its_tables_is_evidence_of_nothing(path: str, tracking_uri: str) -> None:
    run_id = log(tracking_uri)
    (artifact_folder(tracking_uri, run_id) / path).unlink()
    with pytest.raises(EvidenceError, match=f"MLflow run {run_id} is no evidence"):
        QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT)


def test_losses_that_are_no_numbers_are_evidence_of_nothing(tracking_uri: str) -> None:
    nats = [np.array([1.0, np.nan, 1.0, 1.0]), np.array([1.0, 1.0, 1.0])]
    log(tracking_uri, runtimes={"int8": figures_of(nats, HELD_OUT)}, baseline=None, places=())
    with pytest.raises(EvidenceError, match=r"is no evidence: losses\.0\.nats: must be a finite number, got nan"):
        QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT)


def test_a_model_that_was_not_asked_to_write_has_no_stories(tracking_uri: str) -> None:
    log(tracking_uri, written=None, baseline_written=None)
    evidence = QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT)
    assert evidence is not None
    assert evidence.stories == ()
    assert "written/ended" not in evidence.metrics


def test_the_judges_score_is_beside_each_story(tracking_uri: str) -> None:
    read = tuple(Judged(float(number), 3, 9) for number in range(4))
    judged = report(judgement=Judgement("big", read, read[:1]))
    log(tracking_uri, judgement=Judgement("big", read, read[:1]))
    evidence = QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT)
    assert evidence is not None
    assert [row["judge_nats"] for row in evidence.stories] == [0.0, 1.0, 2.0, 3.0]
    metrics = _metrics(judged)
    assert metrics["judge/perplexity"] == pytest.approx(math.exp(6 / 12))
    assert metrics["judge/reference_perplexity"] == 1.0


def test_losses_of_every_runtime_and_of_the_baseline_are_in_one_row() -> None:
    row = _loss_rows(report())[0]
    assert row["nats"] == row["nats_int8"] == 6.5
    assert row["nats_fp32"] == pytest.approx(6.5 * 0.99)
    baseline = report().baseline
    assert baseline is not None
    assert row["nats_baseline"] == pytest.approx(float(baseline.figures.nats[0].sum()))


def test_every_mean_has_its_interval_among_the_metrics() -> None:
    metrics = _metrics(report())
    for name in (
        "bits_per_byte",
        "loss",
        "written/ended",
        "written/copied_words",
        "rare_names/kept",
        "rare_names/mutated",
    ):
        low, value, high = (float(metrics[f"{name}{end}"] or 0) for end in ("_low", "", "_high"))
        assert low <= value <= high
    assert metrics["baseline/written/names_kept"] == 0.5
    assert (metrics["stories"], metrics["tokens"], metrics["bytes"]) == (2, 7, 25)
    assert "baseline/bits_per_byte" not in _metrics(report(baseline=None))


def test_tags_and_parameters_name_no_folder_and_no_person() -> None:
    output = {**_tags(report()), **{key: str(value) for key, value in _params(report()).items()}}
    assert str(Path.home()) not in " ".join(output.values())


def test_a_store_that_fails_while_logging_leaves_a_failed_run(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EvidenceStore(tracking_uri, EXPERIMENT)
    client = open_store(tracking_uri)
    place = Path(client.get_experiment_by_name(EXPERIMENT).artifact_location)  # type: ignore[union-attr]
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    place.write_text("a file where the folder of the artifacts should be")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        log_evaluation(report(), store)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])  # type: ignore[union-attr]
    assert run.info.status == "FAILED"
    assert QualityEvidence.newest(tracking_uri, DIGEST_OF_REPORT) is None


def test_a_store_that_is_none_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI ftp:"):
        EvidenceStore("ftp://nowhere", EXPERIMENT)


def test_a_run_of_a_dead_process_is_marked_as_killed_by_the_next(tracking_uri: str) -> None:
    """The owner is a real process that has ended."""
    run_id = log(tracking_uri)
    child = subprocess.run(
        [sys.executable, "-c", "from training.tracking.store import owner_of; print(owner_of().to_text())"],
        cwd=Path(__file__).parents[3],
        env={**os.environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Owner.from_text(child.stdout) is not None
    client = open_store(tracking_uri)
    client.set_tag(run_id, OWNER, child.stdout.strip())
    client.update_run(run_id, status="RUNNING")
    EvidenceStore(tracking_uri, EXPERIMENT)
    assert client.get_run(run_id).info.status == "KILLED"
