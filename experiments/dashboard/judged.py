"""What was measured and decided: benchmarks, and each version with its aliases and the gate's newest verdict."""

from __future__ import annotations

import json
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmark.evidence import DIGEST, EXPERIMENT
from experiments.dashboard.private import target_name, without_places
from experiments.dashboard.records import BenchmarkRow, CheckRow, DecisionRow, VersionRow
from experiments.dashboard.runs import finite
from experiments.gate.run import EXPERIMENT as GATE
from experiments.registry.versions import Version, versions_in

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FIGURES = (
    "tokens_per_second", "total_tokens_per_second", "ttft_p50", "ttft_p95", "itl_p50", "itl_p99",
    "avg_generation_time", "p95_generation_time", "success_rate", "concurrent_handling", "cold_start_s",
    "peak_rss_mb", "requests",
)  # fmt: skip
"""Those of a benchmark's figures that are handed on."""

TAGS = ("model.recipe", "model.step", "model.tokens", "model.best_bits_per_byte", "promoted", "rolled_back")
"""Those of a version's tags that are handed on."""

MOST_BENCHMARKS, MOST_VERSIONS = 100, 50


def benchmark_rows(client: MlflowClient) -> list[BenchmarkRow]:
    """The newest finished benchmarks, newest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    found = client.search_runs(
        [experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=MOST_BENCHMARKS,
        order_by=["attributes.start_time DESC"],
    )  # fmt: skip
    return [_benchmark(run) for run in found]


def version_rows(client: MlflowClient, known: dict[str, DecisionRow]) -> list[VersionRow]:
    """The newest versions, newest first. `known` keeps decisions by their run: what is decided does not change."""
    experiment = client.get_experiment_by_name(GATE)
    chosen = versions_in(client)[:MOST_VERSIONS]
    if experiment is None:
        return [_version(version, None) for version in chosen]
    rows = []
    for version in chosen:
        found = client.search_runs(
            [experiment.experiment_id],
            f"tags.`{DIGEST}` = '{version.digest}' and tags.gate != '' and attributes.status = 'FINISHED'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        rows.append(_version(version, _decision(client, found[0], known) if found else None))
    return rows


def _benchmark(run: Run) -> BenchmarkRow:
    metrics, tags = run.data.metrics, run.data.tags
    figures = {name: finite(metrics.get(name)) for name in FIGURES}
    return BenchmarkRow(
        id=str(run.info.run_id),
        target=target_name(run.data.params.get("target", "")),
        digest=tags.get(DIGEST, ""),
        started=int(run.info.start_time or 0),
        passed={"true": True, "false": False}.get(tags.get("passed", "")),
        figures={name: value for name, value in figures.items() if value is not None},
    )


def _version(version: Version, decision: DecisionRow | None) -> VersionRow:
    return VersionRow(
        number=version.number,
        digest=version.digest,
        aliases=version.aliases,
        created=version.created,
        tags={name: without_places(version.tags[name]) for name in TAGS if name in version.tags},
        decision=decision,
    )


def _decision(client: MlflowClient, run: Run, known: dict[str, DecisionRow]) -> DecisionRow:
    run_id = str(run.info.run_id)
    if run_id not in known:
        known[run_id] = _read_decision(client, run)
    return known[run_id]


def _read_decision(client: MlflowClient, run: Run) -> DecisionRow:
    """The run's `decision.json`; where that is gone, the verdict alone, and a note that says so."""
    tags = run.data.tags
    with tempfile.TemporaryDirectory(prefix="story-overview-") as folder:
        try:
            path = Path(client.download_artifacts(run.info.run_id, "decision.json", folder))
            plain = json.loads(path.read_text("utf-8"))
            return DecisionRow(
                verdict=str(plain["verdict"]),
                decided=round(datetime.fromisoformat(plain["decided"]).timestamp() * 1000),
                champion=str(plain["champion"] or ""),
                checks=tuple(_check(check) for check in plain["checks"]),
                notes=tuple(without_places(str(note)) for note in plain["notes"]),
            )
        except Exception:  # whatever keeps the files tells in its own way that one is gone
            note = "the checks of this decision cannot be read"
    return DecisionRow(
        verdict=tags.get("gate", ""),
        decided=int(run.info.start_time or 0),
        champion=tags.get("champion.digest", ""),
        checks=(),
        notes=(note,),
    )


def _check(plain: dict[str, Any]) -> CheckRow:
    return CheckRow(
        metric=str(plain["metric"]),
        verdict=str(plain["verdict"]),
        value=finite(plain["value"]),
        unit=str(plain["unit"]),
        bound=str(plain["bound"]),
        threshold=float(plain["threshold"]),
        margin=finite(plain["margin"]),
        low=finite(plain["low"]),
        high=finite(plain["high"]),
        n=int(plain["n"]),
        why=without_places(str(plain["why"])),
    )
