"""A run as the loop would report it, and a look into the store it went to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.tracking.observer import MlflowObserver
from training.tracking.store import open_store
from training.trainer.observers import EvaluationReport, Outcome, RunEnd, RunStart, StepReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


DIGEST = "23e8e5daf148a0ad1d60562b19672a3dc7c781b320c87b41ebe1dddb4460b6cb"
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 0,
    "minutes": None,
    "compile": True,
    "model": {"width": 64, "pattern": "RRA"},
    "optimizer": {"name": "muon", "matrix_lr": 0.02},
    "samples": ["Once upon a time"],
}


def start(out: Path, *, resumed_from: int = 0, recipe: dict[str, Any] = RECIPE) -> RunStart:
    return RunStart(
        recipe=recipe,
        parameters=5_200_000,
        data={"digest": DIGEST, "splits": {"train": {"tokens": 100, "bytes": 400}}, "sources": []},
        data_folder=Path("data/tinystories"),
        out=out,
        world_size=2,
        resumed_from=resumed_from,
    )


def step(number: int, *, loss: float = 2.0) -> StepReport:
    return StepReport(
        step=number,
        tokens=number * 512,
        loss=loss,
        learning_rate=0.01,
        grad_norm=0.5,
        tokens_per_second=7000.0,
        elapsed=number * 0.5,
        progress=number / 1000,
    )


def evaluation(number: int, bits: float, *, best: bool = True) -> EvaluationReport:
    return EvaluationReport(
        step=number,
        tokens=number * 512,
        loss=bits * 2.5,
        bits_per_byte=bits,
        best=best,
        samples=(("Once upon a time", f" there was a café at step {number}.\n\nThe end."),),
        elapsed=number * 0.5,
    )


def end(outcome: Outcome = "finished", checkpoint: Path | None = None) -> RunEnd:
    return RunEnd(
        outcome=outcome, reason="a reason", step=200, tokens=102_400, best_bits_per_byte=0.8, checkpoint=checkpoint
    )


def observer_on(uri: str, **options: Any) -> MlflowObserver:
    """Without system metrics, whose thread has nothing to do with most tests."""
    return MlflowObserver(uri, **{"system_seconds": None, **options})


def get_run(uri: str, run_id: str) -> Run:
    return open_store(uri).get_run(run_id)


def curve(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((one.step, one.value) for one in client.get_metric_history(run_id, key))


def text_of(client: MlflowClient, run_id: str, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run_id, path, str(folder))).read_text(encoding="utf-8")
