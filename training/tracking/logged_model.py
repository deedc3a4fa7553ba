"""The best checkpoint as a logged model of its MLflow run: its files, its digest, the figures of its step."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "story-writer"
DIGEST = "checkpoint.digest"
INHERITED = ("git.sha", "git.dirty", "data.digest")
"""Tags of the run that its model carries too."""


def log_checkpoint(client: MlflowClient, run_id: str, checkpoint: Path) -> str:
    """Store the files of `checkpoint` (a folder) as a logged model of the run; returns the model's id.

    After a resume that found nothing better the same checkpoint is there already, and is not stored twice.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    digest = folder_digest(checkpoint)
    for output in run.outputs.model_outputs if run.outputs else []:
        if client.get_logged_model(output.model_id).tags.get(DIGEST) == digest:
            return str(output.model_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=MODEL_NAME,
        source_run_id=run_id,
        tags={key: run.data.tags[key] for key in INHERITED if key in run.data.tags} | {DIGEST: digest},
        params=run.data.params,
        model_type="checkpoint",
    )
    try:
        client.log_model_artifacts(model.model_id, str(checkpoint))
    except Exception:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")

    bits = client.get_metric_history(run_id, "val/bits_per_byte")
    best = min(bits, key=lambda metric: metric.value, default=None)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0 if best is None else best.step)])
    if best is not None:
        data = run.inputs.dataset_inputs[0].dataset if run.inputs and run.inputs.dataset_inputs else None
        losses = client.get_metric_history(run_id, "val/loss")
        of_this_step = [one for one in losses if (one.step, one.timestamp) == (best.step, best.timestamp)]
        # Key, time and step are those of the run's own points, so the run's curves get no second ones.
        metrics = [
            Metric(
                metric.key,
                metric.value,
                metric.timestamp,
                metric.step,
                model_id=model.model_id,
                dataset_name=None if data is None else data.name,
                dataset_digest=None if data is None else data.digest,
                run_id=run_id,
            )
            for metric in (best, *of_this_step)
        ]
        client.log_batch(run_id, metrics=metrics, synchronous=True)
    return str(model.model_id)


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, in the order of their names."""
    total = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()
