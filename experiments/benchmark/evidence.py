"""A benchmark in MLflow: logged whole, tied to the model's digest, and read back so that a gate can rely on it.

What is read back is not believed: its figures are computed again from the raw rows, and evidence whose figures do
not follow from its rows (or whose rows are gone) is an `EvidenceError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benchmark.figures import draw_figures
from experiments.benchmark.measures import COUNTED, Figure, Figures, headline
from experiments.benchmark.memory import MemoryUse
from experiments.benchmark.report import Report
from experiments.benchmark.sample import Sample
from experiments.benchmark.shown import markdown
from model.errors import InputError, StoryError
from training.tracking.runs import now
from training.tracking.store import (
    LAST_SEEN,
    OWNER,
    mark_stale_runs,
    open_experiment,
    open_store,
    owner_of,
    unusable,
)

if TYPE_CHECKING:
    from pandas import DataFrame

EXPERIMENT = "story-benchmark"
SAMPLES, REPORT, PAGE, FIGURES = "samples.parquet", "report.json", "report.md", "figures"
DIGEST, AGAINST, EVIDENCE = "artifact.digest", "against.digest", "evidence"
"""Tags: whose figures they are, whose they were compared with, and `benchmark` if they are enough to judge by."""
CLOSE = 1e-9


class EvidenceError(StoryError):
    """A run's evidence is missing or does not hold together; nothing can be decided by it."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class BenchmarkEvidence:
    """One run as the gate reads it."""

    run_id: str
    digest: str
    began: datetime
    """With its time zone, UTC."""
    figures: Figures
    """Computed again from `samples`; memory and ratios are those of the report."""
    samples: tuple[Sample, ...]
    report: dict[str, Any]
    """`report.json`: plan, machine, comparison with its intervals, thresholds as they were then."""


def to_frame(samples: Sequence[Sample]) -> DataFrame:
    """One row a request; `first` and `last` stand beside what they are derived from."""
    from pandas import DataFrame

    rows = [{**dataclasses.asdict(row), "first": row.first, "last": row.last} for row in samples]
    names = [*(field.name for field in dataclasses.fields(Sample)), "first", "last"]
    frame = DataFrame(rows, columns=names)
    return frame.astype({"first": "float64", "last": "float64"})


def from_frame(frame: DataFrame) -> list[Sample]:
    """The rows again. Raises `EvidenceError` when a column is missing."""
    names = [field.name for field in dataclasses.fields(Sample)]
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise EvidenceError(f"the rows of the benchmark lack {', '.join(missing)}")
    samples = []
    for row in frame[names].to_dict("records"):
        row["arrivals"] = [float(value) for value in row["arrivals"]]
        row["counts"] = [int(value) for value in row["counts"]]
        row["error"] = row["error"] if isinstance(row["error"], str) else None
        samples.append(Sample(**{str(key): value for key, value in row.items()}))
    return samples


def log_benchmark(report: Report, samples: Sequence[Sample], uri: str) -> str:
    """Log a run with all its artifacts to the store at `uri`; returns the run's id.

    Raises:
        InputError: the store cannot be used. `MissingExtraError`: MLflow is not installed.
    """
    client = open_store(uri)
    from mlflow.entities import Metric, Param

    experiment = open_experiment(client, uri, EXPERIMENT)
    run_id = None
    try:
        mark_stale_runs(client, experiment)
        name = f"{report.target} {report.digest[:8]}" if report.digest else report.target
        time = int(datetime.fromisoformat(report.began).timestamp() * 1000)
        tags = _tags(report) | {OWNER: owner_of().to_text(), LAST_SEEN: str(now())}
        run_id = str(client.create_run(experiment, time, tags, name).info.run_id)
        points = [(key, value, 0) for key, value in _headline(report).items()]
        points += [
            (f"{part.phase}/{key}", figure.value, part.level)
            for part in report.phases
            for key, figure in part.figures.items()
        ]
        metrics = [Metric(key, value, time, step) for key, value, step in points if math.isfinite(value)]
        params = [Param(key, _text(value)) for key, value in report.plan.as_dict().items()]
        params.append(Param("target", report.target))
        client.log_batch(run_id, params=params)
        for start in range(0, len(metrics), 900):  # MLflow takes at most 1,000 at once
            client.log_batch(run_id, metrics=metrics[start : start + 900])
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            logged = dataclasses.replace(report, run_id=run_id)
            to_frame(samples).to_parquet(folder / SAMPLES, index=False)
            text = json.dumps(logged.as_dict(), ensure_ascii=False, indent=2)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
            (folder / PAGE).write_text(markdown(logged), encoding="utf-8")
            draw_figures(samples, folder / FIGURES)
            client.log_artifacts(run_id, str(folder))
        # Only a finished run is evidence: one that broke off in between is never found.
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        with suppress(Exception):
            if run_id is not None:
                client.set_terminated(run_id, "FAILED")
        raise unusable(uri, error) from error
    return run_id


def load_benchmark_evidence(uri: str, digest: str, *, against: str | None = None) -> BenchmarkEvidence | None:
    """The newest finished benchmark of the model with this digest; None when there is none.

    With `against`, the newest that compared it with the model of that digest.

    Raises:
        EvidenceError: the newest one's rows or report are missing or damaged, or do not belong together.
        InputError: a digest is not one, or the store cannot be used.
    """
    for given in (digest, digest if against is None else against):
        if not re.fullmatch(r"[0-9a-f]{64}", given):
            raise InputError("digest", f"must be 64 hexadecimal digits, got {given!r}")
    client = open_store(uri)
    wanted = f"tags.{EVIDENCE} = 'benchmark'" if against is None else f"tags.`{AGAINST}` = '{against}'"
    query = f"tags.`{DIGEST}` = '{digest}' and {wanted} and attributes.status = 'FINISHED'"
    try:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return None
        found = client.search_runs(
            [experiment.experiment_id], query, order_by=["attributes.start_time DESC"], max_results=1
        )
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        raise unusable(uri, error) from error
    if not found:
        return None
    run_id = str(found[0].info.run_id)
    with tempfile.TemporaryDirectory() as place:
        try:
            import pandas

            rows = pandas.read_parquet(client.download_artifacts(run_id, SAMPLES, place))
            path = client.download_artifacts(run_id, REPORT, place)
            report = json.loads(Path(path).read_text("utf-8"))
        except Exception as error:  # whatever a store, a file system or a reader of parquet may raise
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise EvidenceError(f"benchmark {run_id} cannot be read: {first_line}") from None
    samples = from_frame(rows)
    try:
        evidence = BenchmarkEvidence(
            run_id=run_id,
            digest=report["digest"],
            began=datetime.fromisoformat(report["began"]),
            figures=_recomputed(report, samples),
            samples=tuple(samples),
            report=report,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvidenceError(f"the report of benchmark {run_id} is damaged: {error!r}") from None
    if evidence.digest != digest:
        raise EvidenceError(
            f"benchmark {run_id} is tagged for {digest[:12]} and was of {evidence.digest[:12]}"
        )
    return evidence


def _recomputed(report: dict[str, Any], samples: Sequence[Sample]) -> Figures:
    """The headline out of the rows; raises `EvidenceError` if the report says anything else."""
    plan, told, counts = report["plan"], report, report["n"]
    memory = None
    if "peak_rss_mb" in counts:
        memory = MemoryUse(told["peak_rss_mb"], told["memory_percent"], counts["peak_rss_mb"])
    own = [sample for sample in samples if sample.target == "target"]
    figures = headline(own, ttft_limit=plan["ttft_limit"], itl_limit=plan["itl_limit"], memory=memory)
    for name, ratio in ((report["comparison"] or {}).get("ratios") or {}).items():
        figures[name] = Figure(ratio["value"], ratio["n"])
    wrong = [
        name
        for name in figures.keys() | counts.keys()
        if name not in figures
        or counts.get(name) != figures[name].n
        or not math.isclose(told[name], figures[name].value, rel_tol=CLOSE)
    ]
    if wrong:
        raise EvidenceError(
            f"benchmark {report['run_id']}: {', '.join(sorted(wrong))} do not follow from its rows"
        )
    return figures


def _tags(report: Report) -> dict[str, str]:
    tags = {**report.origin.tags(), "thresholds.digest": report.thresholds_digest}
    tags["passed"] = str(report.passed).lower()
    tags |= {
        f"machine.load.{when}": f"{value:.2f}"
        for when, value in zip(("before", "after"), report.load, strict=True)
    }
    if report.digest is not None:
        tags[DIGEST] = report.digest
        if set(report.plan.phases) & set(COUNTED):
            tags[EVIDENCE] = "benchmark"
        if report.comparison is not None and report.comparison.against_digest is not None:
            tags[AGAINST] = report.comparison.against_digest
    if report.comparison is not None:
        tags["against"] = report.comparison.against
    return tags


def _headline(report: Report) -> dict[str, float]:
    return {name: figure.value for name, figure in report.figures.items()}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
