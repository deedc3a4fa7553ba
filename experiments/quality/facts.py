"""An evaluation in MLflow's words: tags, parameters and metrics of its run, and the rows of its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.quality.generated import MAX_TOKENS, prompts_digest
from experiments.quality.report import QualityReport
from model.generation import SamplingParams
from training.tracking.provenance import provenance
from training.tracking.runs import now

if TYPE_CHECKING:
    from mlflow.entities import Metric

DIGEST = "artifact.digest"
"""Tag: the digest of the model folder that was measured."""


def loss_rows(report: QualityReport) -> list[dict[str, Any]]:
    """A row for each held-out story: by the served runtime, by the floor, and by the other runtimes."""
    held_out, served = report.held_out, report.served.story_nats
    rows = [
        {"id": name, "nats": float(nats), "tokens": len(tokens), "bytes": int(size)}
        for name, nats, tokens, size in zip(
            held_out.ids, served, held_out.tokens, held_out.bytes, strict=True
        )
    ]
    others = {f"nats_{name}": figures.story_nats for name, figures in report.runtimes.items()}
    if report.floor is not None:
        others["nats_floor"] = report.floor.figures.story_nats
    for key, values in others.items():
        for row, value in zip(rows, values, strict=True):
            row[key] = float(value)
    return rows


def story_rows(report: QualityReport) -> list[dict[str, Any]]:
    """A row for each written story, with the judge's word if there was one."""
    assert report.written is not None
    rows = report.written.rows()
    if report.judgement is not None:
        for row, judged in zip(rows, report.judgement.stories, strict=True):
            row |= {"judge_nats": judged.nats, "judge_tokens": judged.tokens, "judge_bytes": judged.bytes}
    return rows


def tags_of(report: QualityReport) -> dict[str, str]:
    """Whose evidence this is, what made it, and what was not measured."""
    origin = provenance()
    tags = origin.tags() | {
        DIGEST: report.digest,
        "data.digest": report.held_out.digest,
        "mlflow.source.name": "story evaluate",
        "mlflow.source.type": "LOCAL",
    }
    if origin.git_sha is not None:
        tags["mlflow.source.git.commit"] = origin.git_sha
    return tags | {f"skipped.{name}": reason for name, reason in report.left_out.items()}


def params_of(report: QualityReport) -> dict[str, Any]:
    """What the figures depend on."""
    params: dict[str, Any] = {
        "model": report.model,
        "runtime": report.runtime,
        "git.sha": provenance().git_sha or "unknown",
        "data": {
            "files": ", ".join(Path(name).name for name in report.data),
            "digest": report.held_out.digest,
            "stories": report.stories,
        },
    }
    if report.floor is not None:
        params["floor"] = {
            "order": report.floor.table.order, "source": report.floor.source, "tokens": report.floor.tokens
        }  # fmt: skip
    if report.written is not None:
        sampling = SamplingParams()
        params["seeds"] = report.written.seeds
        first = report.written.seeds[0]
        asked = [story.prompt for story in report.written.stories if story.seed == first]
        params["prompts.digest"] = prompts_digest(asked)
        params["sampling"] = {
            name: getattr(sampling, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        } | {"max_tokens": MAX_TOKENS}
    if report.training_name is not None:
        params["train_data"] = report.training_name
    return params


def metrics_of(report: QualityReport) -> list[Metric]:
    """All means with their intervals, and loss by place as curves; what was not measured is left out."""
    from mlflow.entities import Metric

    time = now()
    figures: dict[str, float | None] = {
        "bits_per_byte": report.served.bits_per_byte, "loss": report.served.loss,
        "tokens": report.tokens, "bytes": report.bytes, "stories": report.stories,
        "held_out_seen": report.seen_in_training,
    }  # fmt: skip
    for name, estimate in report.intervals().items():
        figures |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    for runtime, measured in report.runtimes.items():
        figures |= {f"{runtime}/bits_per_byte": measured.bits_per_byte, f"{runtime}/loss": measured.loss}
    if report.floor is not None:
        below = report.floor.figures
        figures |= {"floor/bits_per_byte": below.bits_per_byte, "floor/loss": below.loss}
    if report.written is not None:
        for name, estimate in report.written.estimates().items():
            figures |= {
                f"written/{name}": estimate.value,
                f"written/{name}_low": estimate.low,
                f"written/{name}_high": estimate.high,
            }
        longest = report.written.longest_copy
        figures["written/copied_words_max"] = None if longest is None else longest.words
    if report.floor_written is not None:
        for name, estimate in report.floor_written.estimates().items():
            figures[f"floor/written/{name}"] = estimate.value
    if report.judgement is not None:
        judged = report.judgement.as_dict()
        figures |= {f"judge/{name}": judged[name] for name in judged if name != "judge"}
    metrics = [Metric(key, float(value), time, 0) for key, value in figures.items() if value is not None]
    # A curve in MLflow's page: its step is the first place of the bucket.
    for place in report.places:
        metrics.append(Metric("loss_by_place", place.loss, time, place.first))
        if place.floor_loss is not None:
            metrics.append(Metric("floor/loss_by_place", place.floor_loss, time, place.first))
    return metrics
