"""A benchmark in MLflow: logged completely, tied to the model's digest, and read back as evidence for the gate.

Figures are computed again from the raw rows when they are read back. Evidence whose figures do not follow from its
rows, or whose rows are gone, is an `EvidenceError`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from experiments.benchmark.figures import draw_figures
from experiments.benchmark.measures import COUNTED, Figure, Figures, MemoryUse, Sample, headline
from experiments.benchmark.render import markdown
from experiments.benchmark.report import Report
from experiments.common.evidence_runs import (
    DIGEST,
    EvidenceError,
    EvidenceStore,
    finished_runs,
    read_artifact,
    store_errors,
)
from model.errors import InputError
from training.tracking.store import open_store

if TYPE_CHECKING:
    from pandas import DataFrame

EXPERIMENT = "story-benchmark"
SAMPLES, REPORT, PAGE, FIGURES = "samples.parquet", "report.json", "report.md", "figures"
AGAINST, EVIDENCE = "against.digest", "evidence"
"""Tags: the digest of the other side of a comparison, and `benchmark` if the run is enough to judge by."""
CLOSE = 1e-9


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
    """`report.json`: plan, machine, comparison with its intervals, thresholds at that time."""


def to_frame(samples: Sequence[Sample]) -> DataFrame:
    """One row a request, with `first` and `last` beside the times they are derived from."""
    from pandas import DataFrame

    rows = [{**dataclasses.asdict(row), "first": row.first, "last": row.last} for row in samples]
    names = [*(field.name for field in dataclasses.fields(Sample)), "first", "last"]
    return DataFrame(rows, columns=names).astype({"first": "float64", "last": "float64"})


def from_frame(frame: DataFrame) -> list[Sample]:
    """The inverse of `to_frame`. Raises `EvidenceError` when a column is missing."""
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
    name = f"{report.target} {report.digest[:8]}" if report.digest else report.target
    began = int(datetime.fromisoformat(report.began).timestamp() * 1000)
    with EvidenceStore(uri, EXPERIMENT).run(name, _tags(report), began=began) as run:
        plan = report.plan.as_dict() | {"phases": ",".join(report.plan.phases)}
        run.log_params({key: str(value) for key, value in plan.items()} | {"target": report.target})
        run.log_metrics({key: figure.value for key, figure in report.figures.items()})
        for part in report.phases:
            figures = {f"{part.phase}/{key}": figure.value for key, figure in part.figures.items()}
            run.log_metrics(figures, step=part.level)
        logged = dataclasses.replace(report, run_id=run.run_id)
        with run.artifacts() as folder:
            to_frame(samples).to_parquet(folder / SAMPLES, index=False)
            text = json.dumps(logged.as_dict(), ensure_ascii=False, indent=2)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
            (folder / PAGE).write_text(markdown(logged), encoding="utf-8")
            draw_figures(samples, folder / FIGURES)
    return run.run_id


def load_benchmark_evidence(uri: str, digest: str, *, against: str | None = None) -> BenchmarkEvidence | None:
    """The newest finished benchmark of the model with this digest; None when there is none.

    With `against`, the newest that compared it with the model of that digest.

    Raises:
        EvidenceError: its rows or report are missing or damaged, or do not belong together.
        InputError: a digest is not one, or the store cannot be used.
    """
    for given in (digest, digest if against is None else against):
        if not re.fullmatch(r"[0-9a-f]{64}", given):
            raise InputError("digest", f"must be 64 hexadecimal digits, got {given!r}")
    client = open_store(uri)
    kind = f"tags.{EVIDENCE} = 'benchmark'" if against is None else f"tags.`{AGAINST}` = '{against}'"
    with store_errors(uri):
        found = finished_runs(client, EXPERIMENT, f"tags.`{DIGEST}` = '{digest}' and {kind}")
    if not found:
        return None
    run_id = str(found[0].info.run_id)
    try:
        import pandas

        rows = pandas.read_parquet(io.BytesIO(read_artifact(client, run_id, SAMPLES)))
        report = json.loads(read_artifact(client, run_id, REPORT))
    except Exception as error:  # whatever a store, a file system or the parquet library may raise
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
        raise EvidenceError(f"benchmark {run_id} is tagged for {digest[:12]} and was of {evidence.digest[:12]}")
    return evidence


def _recomputed(report: dict[str, Any], samples: Sequence[Sample]) -> Figures:
    """The headline figures out of the rows. Raises `EvidenceError` if the report states anything else."""
    plan, counts = report["plan"], report["n"]
    memory = None
    if "peak_rss_mb" in counts:
        memory = MemoryUse(report["peak_rss_mb"], report["memory_percent"], counts["peak_rss_mb"])
    own = [sample for sample in samples if sample.target == "target"]
    figures = headline(own, ttft_limit=plan["ttft_limit"], itl_limit=plan["itl_limit"], memory=memory)
    for name, ratio in ((report["comparison"] or {}).get("ratios") or {}).items():
        figures[name] = Figure(ratio["value"], ratio["n"])
    wrong = [
        name
        for name in figures.keys() | counts.keys()
        if name not in figures
        or counts.get(name) != figures[name].n
        or not math.isclose(report[name], figures[name].value, rel_tol=CLOSE)
    ]
    if wrong:
        raise EvidenceError(f"benchmark {report['run_id']}: {', '.join(sorted(wrong))} do not follow from its rows")
    return figures


def _tags(report: Report) -> dict[str, str]:
    tags = {**report.origin.tags(), "thresholds.digest": report.thresholds_digest}
    tags["passed"] = str(report.passed).lower()
    for when, load in zip(("before", "after"), report.load, strict=True):
        tags[f"machine.load.{when}"] = f"{load:.2f}"
    if report.digest is not None:
        tags[DIGEST] = report.digest
        if set(report.plan.phases) & set(COUNTED):
            tags[EVIDENCE] = "benchmark"
        if report.comparison is not None and report.comparison.against_digest is not None:
            tags[AGAINST] = report.comparison.against_digest
    if report.comparison is not None:
        tags["against"] = report.comparison.against
    return tags
