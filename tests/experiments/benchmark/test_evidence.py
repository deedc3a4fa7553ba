"""Evidence in a real MLflow store: whole, tied to a digest, and not believed when it does not hold together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmark.evidence import (
    AGAINST,
    EXPERIMENT,
    REPORT,
    SAMPLES,
    BenchmarkEvidence,
    log_benchmark,
    read_samples,
    to_frame,
)
from experiments.benchmark.load import Plan
from experiments.benchmark.measures import FailureKind, Sample
from experiments.common.evidence_runs import EvidenceError
from experiments.common.thresholds import load_thresholds
from model.errors import InputError
from tests.experiments.benchmark.made import DIGEST, OTHER, comparison, report, row, samples
from training.tracking.store import open_store


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second a run; only the test that looks for the pictures waits for them."""
    if request.function is not test_a_run_is_logged_completely:
        monkeypatch.setattr("experiments.benchmark.evidence.draw_figures", lambda rows, folder: [])


def artifact(uri: str, run_id: str, path: str) -> Path:
    """The stored file itself, which a test may change."""
    base = Path(open_store(uri).get_run(run_id).info.artifact_uri.removeprefix("file://"))
    assert (base / path).is_file()
    return base / path


def test_a_run_is_logged_completely(tracking_uri: str) -> None:
    run_id = log_benchmark(report(compared=comparison()), samples(), tracking_uri)
    client = open_store(tracking_uri)
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"local {DIGEST[:8]}")
    figures = report(compared=comparison()).figures
    assert {name: run.data.metrics[name] for name in figures} == {
        name: figure.value for name, figure in figures.items()
    }
    assert run.data.metrics["single/ttft_p50"] == 0.5
    by_level = client.get_metric_history(run_id, "stress/total_tokens_per_second")
    assert {(point.step, point.value) for point in by_level} == {(1, 1.2), (4, 4.8)}
    assert (
        run.data.params.items()
        >= {"concurrency": "4", "seed": "0", "phases": "cold,single,concurrent,stress,open", "target": "local"}.items()
    )
    assert (
        run.data.tags.items()
        >= {
            "artifact.digest": DIGEST,
            "against.digest": OTHER,
            "against": "local (older)",
            "evidence": "benchmark",
            "passed": "true",
            "thresholds.digest": load_thresholds().digest,
            "git.sha": "f" * 40,
            "machine.cores": "2",
            "machine.cpu": "Z80",
            "machine.load.before": "0.50",
        }.items()
    )
    files = {entry.path for entry in client.list_artifacts(run_id)}
    assert files == {"figures", "report.json", "report.md", "samples.parquet"}
    pictures = {entry.path for entry in client.list_artifacts(run_id, "figures")}
    assert pictures == {
        f"figures/{name}.png" for name in ("latency_cdf", "ttft_histogram", "itl_histogram", "throughput", "timeline")
    }
    output = json.loads(artifact(tracking_uri, run_id, REPORT).read_text("utf-8"))
    assert (output["run_id"], output["requests"]) == (run_id, 11)


def test_evidence_comes_back_as_it_went(tracking_uri: str) -> None:
    run_id = log_benchmark(report(compared=comparison()), samples(), tracking_uri)
    evidence = BenchmarkEvidence.newest(tracking_uri, DIGEST)
    assert evidence is not None
    assert (evidence.run_id, evidence.digest) == (run_id, DIGEST)
    assert list(evidence.samples) == samples()
    assert evidence.figures == report(compared=comparison()).figures
    assert evidence.began.isoformat(timespec="milliseconds") == "2026-11-24T12:00:00.000+00:00"
    assert evidence.report.comparison is not None
    assert evidence.report.comparison.ratios["ttft_ratio"].low == 0.9


def test_the_newest_run_of_this_very_digest_is_found(tracking_uri: str) -> None:
    def logged(minute: int, **options: Any) -> str:
        made = report(began=f"2026-11-24T12:{minute:02}:00.000+00:00", **options)
        return log_benchmark(made, samples(), tracking_uri)

    assert BenchmarkEvidence.newest(tracking_uri, DIGEST) is None
    newest = logged(30)
    logged(10)
    logged(40, digest=OTHER)
    compared = logged(20, compared=comparison())
    unfinished = logged(59)
    open_store(tracking_uri).set_terminated(unfinished, "FAILED")
    found = BenchmarkEvidence.newest(tracking_uri, DIGEST)
    assert found is not None
    assert found.run_id == newest
    against = BenchmarkEvidence.newest(tracking_uri, DIGEST, {AGAINST: OTHER})
    assert against is not None
    assert against.run_id == compared
    assert BenchmarkEvidence.newest(tracking_uri, OTHER, {AGAINST: DIGEST}) is None
    assert BenchmarkEvidence.newest(tracking_uri, "ef" * 32) is None


def test_a_run_of_a_comparison_alone_is_no_evidence_of_its_own(tracking_uri: str) -> None:
    rows = [sample for sample in samples() if sample.phase == "compare"]
    plan = Plan(phases=("compare",))
    log_benchmark(report(rows, compared=comparison(), plan=plan, memory={}), rows, tracking_uri)
    assert BenchmarkEvidence.newest(tracking_uri, DIGEST) is None
    assert BenchmarkEvidence.newest(tracking_uri, DIGEST, {AGAINST: OTHER}) is not None


def test_half_the_rows_deleted_is_noticed(tracking_uri: str) -> None:
    run_id = log_benchmark(report(), samples(), tracking_uri)
    path = artifact(tracking_uri, run_id, SAMPLES)
    frame = pandas.read_parquet(path)
    frame.iloc[::2].to_parquet(path, index=False)
    message = f"^MLflow run {run_id} is no evidence: avg_generation_time, .* more do not follow from its rows$"
    with pytest.raises(EvidenceError, match=message):
        BenchmarkEvidence.newest(tracking_uri, DIGEST)


def test_a_figure_that_was_made_nicer_is_noticed(tracking_uri: str) -> None:
    run_id = log_benchmark(report(), samples(), tracking_uri)
    path = artifact(tracking_uri, run_id, REPORT)
    output = json.loads(path.read_text("utf-8"))
    output["ttft_p95"] *= 0.999
    path.write_text(json.dumps(output), encoding="utf-8")
    with pytest.raises(EvidenceError, match=r": ttft_p95 do not follow from its rows$"):
        BenchmarkEvidence.newest(tracking_uri, DIGEST)


def test_evidence_tagged_for_another_model_is_noticed(tracking_uri: str) -> None:
    run_id = log_benchmark(report(digest=OTHER), samples(), tracking_uri)
    open_store(tracking_uri).set_tag(run_id, "artifact.digest", DIGEST)
    with pytest.raises(EvidenceError, match=f"is tagged for {DIGEST[:12]} and was of {OTHER[:12]}"):
        BenchmarkEvidence.newest(tracking_uri, DIGEST)


@pytest.mark.parametrize("damage", ["gone", "garbage", "column", "report gone", "report without plan"])
def test_damaged_evidence_is_an_error_that_leaves_the_gate_undecided(damage: str, tracking_uri: str) -> None:
    run_id = log_benchmark(report(), samples(), tracking_uri)
    rows, output = artifact(tracking_uri, run_id, SAMPLES), artifact(tracking_uri, run_id, REPORT)
    match damage:
        case "gone":
            rows.unlink()
        case "garbage":
            rows.write_bytes(b"PAR1 no")
        case "column":
            pandas.read_parquet(rows).drop(columns="tokens").to_parquet(rows)
        case "report gone":
            output.unlink()
        case _:
            kept = json.loads(output.read_text("utf-8"))
            del kept["plan"]
            output.write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(EvidenceError) as caught:
        BenchmarkEvidence.newest(tracking_uri, DIGEST)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digest", ["abc", "' or '1' = '1", "AB" * 32, ""])
def test_what_is_no_digest_is_not_searched_for(digest: str, tracking_uri: str) -> None:
    with pytest.raises(InputError, match="digest must be 64 hexadecimal digits"):
        BenchmarkEvidence.newest(tracking_uri, digest)
    with pytest.raises(InputError, match="digest must be 64 hexadecimal digits"):
        BenchmarkEvidence.newest(tracking_uri, DIGEST, {AGAINST: digest})


def test_a_store_that_cannot_be_used_is_named() -> None:
    for call in (
        lambda uri: log_benchmark(report(), samples(), uri),
        lambda uri: BenchmarkEvidence.newest(uri, DIGEST),
    ):
        with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI tale:/runs cannot be used"):
            call("tale:/runs")


TIME = st.floats(0, 1e6, allow_nan=False)


@given(
    st.lists(
        st.builds(
            row,
            st.sampled_from(["single", "open"]),
            due=TIME,
            arrivals=st.lists(TIME, max_size=4).map(tuple),
            ended=TIME,
            error=st.sampled_from([None, *get_args(FailureKind)]),
            message=st.text(max_size=5).filter(str.isprintable),
            seed=st.integers(0, 2**48 - 1),
        ),
        max_size=6,
    )
)
def test_rows_survive_parquet_to_the_last_bit(rows: list[Sample]) -> None:
    path = Path("rows.parquet")
    to_frame(rows).to_parquet(path, index=False)
    frame = pandas.read_parquet(path)
    assert read_samples(path.read_bytes()) == rows
    firsts = [math.nan if sample.first is None else sample.first for sample in rows]
    assert frame["first"].tolist() == pytest.approx(firsts, nan_ok=True)
