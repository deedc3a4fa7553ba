"""A benchmark in MLflow: logged completely, tied to the model's digest, and read back as evidence for the gate.

Figures are computed again from the raw rows when they are read back. Evidence whose figures do not follow from its
rows, or whose rows are gone, is an `EvidenceError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from experiments.benchmark.load import Plan
from experiments.benchmark.measures import COUNTED, Figure, Figures, Sample, headline
from experiments.benchmark.render import draw_figures, markdown
from experiments.benchmark.report import Comparison, Report
from experiments.common.evidence_runs import DIGEST, EvidenceStore, StoredEvidence
from model.validation import Record

if TYPE_CHECKING:
    from mlflow.entities import Run
    from pandas import DataFrame

EXPERIMENT = "story-benchmark"
SAMPLES, REPORT, PAGE, FIGURES = "samples.parquet", "report.json", "report.md", "figures"
AGAINST, EVIDENCE = "against.digest", "evidence"
"""Tags: the digest of the other side of a comparison, and `benchmark` if the run is enough to judge by."""
MEMORY = ("peak_rss_mb", "memory_percent")
"""Figures that do not follow from the rows."""
CLOSE = 1e-9


class StoredReport(Record):
    """`report.json`, which has the figures at its top."""

    model_config = ConfigDict(extra="allow")

    digest: str
    plan: Plan
    n: dict[str, int]
    comparison: Comparison | None

    def figures(self) -> Figures:
        """The figures that it states."""
        stated = self.model_extra or {}
        return {name: Figure(stated[name], n) for name, n in self.n.items()}


class BenchmarkEvidence(StoredEvidence):
    """One run as the gate reads it."""

    experiment: ClassVar[str] = EXPERIMENT
    wanted: ClassVar[Mapping[str, str]] = {EVIDENCE: "benchmark"}

    figures: Figures
    """Computed again from `samples`; memory and ratios are those of the report."""
    samples: tuple[Sample, ...]
    report: StoredReport

    @classmethod
    def contents(cls, run: Run, artifact: Callable[[str], bytes]) -> dict[str, Any]:
        """See `StoredEvidence`."""
        samples = read_samples(artifact(SAMPLES))
        report = StoredReport.model_validate_json(artifact(REPORT))
        tagged = run.data.tags[DIGEST]
        if report.digest != tagged:
            raise ValueError(f"it is tagged for {tagged[:12]} and was of {report.digest[:12]}")
        return {"figures": _recomputed(report, samples), "samples": samples, "report": report}


def to_frame(samples: Sequence[Sample]) -> DataFrame:
    """One row a request, with `first` and `last` beside the times they are derived from."""
    from pandas import DataFrame

    rows = [{**dataclasses.asdict(row), "first": row.first, "last": row.last} for row in samples]
    names = [*(field.name for field in dataclasses.fields(Sample)), "first", "last"]
    return DataFrame(rows, columns=names).astype({"first": "float64", "last": "float64"})


def read_samples(content: bytes) -> list[Sample]:
    """The rows of a parquet file that `to_frame` was written to. Raises `ValueError` for anything else."""
    from pyarrow import BufferReader, parquet

    rows = parquet.read_table(BufferReader(content)).to_pylist()
    return TypeAdapter(list[Sample]).validate_python(rows)


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


def _recomputed(report: StoredReport, samples: Sequence[Sample]) -> Figures:
    """The headline figures out of the rows. Raises `ValueError` if the report states anything else."""
    own = [sample for sample in samples if sample.target == "target"]
    stated, plan = report.figures(), report.plan
    ratios = report.comparison.ratios if report.comparison is not None else {}
    figures = headline(own, ttft_limit=plan.ttft_limit, itl_limit=plan.itl_limit)
    figures |= {name: figure for name, figure in stated.items() if name in MEMORY}
    figures |= {name: Figure(ratio.value, ratio.n) for name, ratio in ratios.items()}
    wrong = [
        name
        for name in sorted(figures.keys() | stated.keys())
        if name not in figures
        or name not in stated
        or stated[name].n != figures[name].n
        or not math.isclose(stated[name].value, figures[name].value, rel_tol=CLOSE)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{', '.join(wrong[:5])}{more} do not follow from its rows")
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
