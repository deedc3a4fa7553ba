"""Log a training run to MLflow.

Curves are logged over optimiser steps and, with the suffix `_by_tokens`, over target tokens (as MLflow's step), so that
runs with different batch sizes can be compared. Steps after a killed run's last checkpoint are logged twice.

A store that fails after the start does not stop the run (see `model.outbox`). What was not sent is kept in
`mlflow-unsent-RUN.jsonl` in the run's folder, and a resume sends it.

The ages of a run (`Recipe.ages`) are folders that `model.engine.load.load_bare_engine` opens. They wait in `ages/` in
the run's folder until they are sent, and a resume sends what waits there.
"""

import json
import logging
import math
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.errors import one_line
from model.files import write_atomically
from model.outbox import Leftover, Outbox
from model.settings import without_password
from training.data.corpus import file_sha256
from training.tracking.provenance import Provenance
from training.tracking.runs import begin_run, describe_run, log_tables, now, set_tags, store_errors
from training.tracking.store import LAST_SEEN, default_tracking_uri, mark_stale_runs, open_experiment, open_store
from training.trainer.observers import AgeReport, EvaluationReport, Outcome, RunEnd, RunStart, StepReport, bits_per_nat

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT = "story-training"
STORIES = "samples/stories.json"
"""All sample stories of a run, as a table in MLflow's own form; a page can slide over its steps."""
AGES = "ages"
"""Folder of a run's ages, in its own folder and among its artifacts; also the tag that says how many there are."""
AGE_TABLE = f"{AGES}/ages.json"
"""A row for each age that is stored, in MLflow's form of a table."""
AGE_COLUMNS = ("step", "tokens", "bits_per_byte", "held_out")
"""`held_out`: whether the figure is of the validation stories. If not, it is of that step's own, or unknown."""
REPEATED = 1.2
"""A killed run goes on at an earlier step. An age that comes again, by the clock at another step, is at most so many
times as old as the newest one that is kept."""
UNREACHABLE = "MLflow does not answer; training goes on and its figures are kept: %s"
STATUS: dict[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Point(NamedTuple):
    """One value of one curve."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970, when it was measured."""
    step: int


class MlflowObserver:
    """Logs a run to the MLflow store at `tracking_uri` (default: `default_tracking_uri()`).

    `system_seconds`: interval of MLflow's system metrics, `None` for none. `outbox`: options of `Outbox`. `keep_model`
    stores the best checkpoint and the ages too. `origin`: the code and machine that train, where not this process's.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = EXPERIMENT,
        system_seconds: float | None = 10.0,
        outbox: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        keep_model: bool = True,
        origin: Provenance | None = None,
    ) -> None:
        self._uri = tracking_uri
        self._tags, self._keep_model, self._origin = tags or {}, keep_model, origin
        self._experiment = experiment
        self._system_seconds = system_seconds
        self._options = outbox or {}
        self._rows: list[list[Any]] = []
        self._aged: set[int] = set()
        """Steps of the ages that are stored or wait."""
        self._stored: dict[int, list[Any]] = {}
        """Rows of `AGE_TABLE` by step; after the start they belong to the outbox's thread."""
        self._repeated = -1
        """The newest age that was kept before a kill, if steps up to there come again."""
        self._loss: float | None = None
        self._bits_per_nat: float | None = None
        self._outbox: Outbox[Point] | None = None
        self._monitor: Any = None
        self.run_id = ""
        """The MLflow run's id; empty before the start."""

    def started(self, start: RunStart) -> None:
        """Begin a run, or continue the one that `start.out` names. Raises `InputError` for an unusable store."""
        self._uri = self._uri or default_tracking_uri()
        self._client = open_store(self._uri)
        with store_errors(self._uri):
            experiment_id = open_experiment(self._client, self._uri, self._experiment)
            for run_id in mark_stale_runs(self._client, experiment_id):
                log.warning("MLflow run %s had been killed and is marked so now", run_id)
            run = begin_run(self._client, experiment_id, start)
            self.run_id = run.info.run_id
            describe_run(self._client, run, start, self._origin)
            if self._tags:
                set_tags(self._client, self.run_id, self._tags)
        self._out, self._bits_per_nat = start.out, bits_per_nat(start.data)
        self._unsent = start.out / f"mlflow-unsent-{self.run_id}.jsonl"
        self._outbox = Outbox(
            self._send_points,
            self._send_file,
            on_failure=lambda error: log.warning(UNREACHABLE, self._shown(error)),
            on_recovery=lambda: self._watch_machine(resume=True),
            **self._options,
        )
        if start.resumed_from > 0:
            self._rows = self._table_so_far(STORIES, COLUMNS)
            self._take_up_ages(start.resumed_from)
            self._take_up_unsent()
        else:
            shutil.rmtree(start.out / AGES, ignore_errors=True)
        self._watch_machine(resume=start.resumed_from > 0)

    def stepped(self, report: StepReport) -> None:
        curves = {
            "train/loss": report.loss,
            "train/learning_rate": report.learning_rate,
            "train/grad_norm": report.grad_norm,
            "train/tokens_per_second": report.tokens_per_second,
        }
        self._loss = report.loss
        self._put(report, curves, {"tokens": report.tokens})

    def evaluated(self, report: EvaluationReport) -> None:
        curves = {"val/loss": report.loss, "val/bits_per_byte": report.bits_per_byte}
        # MLflow's table of runs shows a curve's last value, and the last one is not always the best.
        self._put(report, curves, {"val/best_bits_per_byte": report.bits_per_byte} if report.best else {})
        if self._outbox is None:
            return
        if report.samples:
            self._outbox.add_file(f"samples/step-{report.step:06d}.md", samples_page(report))
            # A step that is evaluated again after a resume replaces what it wrote the first time.
            self._rows = [row for row in self._rows if row[0] != report.step] + samples_rows(report)
            self._outbox.add_file(STORIES, json.dumps({"columns": COLUMNS, "data": self._rows}))
        self._outbox.flush()

    def aged(self, report: AgeReport) -> None:
        """Keep the age in the run's folder until the outbox has sent it. One that cannot be written is left out."""
        if self._outbox is None or not self._keep_model or self._is_kept(report):
            return
        bits, held_out = report.bits_per_byte, report.bits_per_byte is not None
        if bits is None and self._loss is not None and self._bits_per_nat is not None:
            bits = self._loss * self._bits_per_nat
        path = f"{AGES}/step-{report.step:06d}"
        folder, fresh = self._out / path, self._out / f"{path}.new"
        row = (report.step, report.tokens, bits, held_out)
        try:
            report.write(fresh, dict(zip(AGE_COLUMNS, row, strict=True)))
            fresh.rename(folder)
        except OSError as error:
            log.warning("the age of step %d is not kept: %s", report.step, one_line(error))
            shutil.rmtree(fresh, ignore_errors=True)
            return
        self._aged.add(report.step)
        self._outbox.add_file(path, "")
        self._outbox.flush()

    def ended(self, end: RunEnd) -> None:
        """Send what is left, log the best checkpoint as a model, close the run; failures are logged, not raised."""
        if self._outbox is None:
            return
        leftover = self._outbox.close()
        self._outbox = None
        error = leftover.error
        if error is None:
            try:
                if self._monitor is not None:
                    self._monitor.finish()
                if self._keep_model and end.checkpoint is not None:
                    log_checkpoint(self._client, self.run_id, end.checkpoint)
                set_tags(self._client, self.run_id, {"outcome": end.outcome, "outcome.reason": end.reason})
                self._client.set_terminated(self.run_id, STATUS[end.outcome])
            except Exception as failure:  # SQLAlchemy's, MLflow's, the driver's or the network's
                error = one_line(failure)
        if error is not None:
            message = "MLflow run %s could not be closed as %s: %s"
            log.warning(message, self.run_id, end.outcome, self._shown(error))
        self._keep_unsent(leftover)

    def _put(self, report: StepReport | EvaluationReport, curves: dict[str, float], others: dict[str, float]) -> None:
        if self._outbox is None:
            return
        time = now()
        over_steps = curves | others | {"elapsed_seconds": report.elapsed}
        points = [Point(key, value, time, report.step) for key, value in over_steps.items()]
        points += [Point(f"{key}_by_tokens", value, time, report.tokens) for key, value in curves.items()]
        self._outbox.add(points)

    def _send_points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(point.key, point.value, point.timestamp, point.step) for point in points]
        seen = [RunTag(LAST_SEEN, str(now()))]
        self._client.log_batch(self.run_id, metrics=metrics, tags=seen, synchronous=True)

    def _send_file(self, path: str, text: str) -> None:
        if path == STORIES:
            log_tables(self._client, self.run_id, {path: text})
        elif path.startswith(f"{AGES}/"):
            self._send_age(path)
        else:
            self._client.log_text(self.run_id, text, path)

    def _send_age(self, path: str) -> None:
        folder = self._out / path
        try:
            notes = json.loads((folder / "config.json").read_bytes())
        except FileNotFoundError:  # somebody has tidied up; trying again would block what comes behind
            log.warning("%s is not there any more and does not reach MLflow", path)
            return
        self._client.log_artifacts(self.run_id, str(folder), path)
        self._stored[notes["step"]] = [notes[name] for name in AGE_COLUMNS]
        rows = [self._stored[step] for step in sorted(self._stored)]
        self._client.log_text(self.run_id, json.dumps({"columns": AGE_COLUMNS, "data": rows}), AGE_TABLE)
        self._client.set_tag(self.run_id, AGES, str(len(rows)))
        shutil.rmtree(folder, ignore_errors=True)

    def _is_kept(self, report: AgeReport) -> bool:
        return report.step in self._aged or report.step <= self._repeated * (1 if report.last else REPEATED)

    def _shown(self, error: str) -> str:
        uri = self._uri or ""
        return error.replace(uri, without_password(uri))

    def _watch_machine(self, *, resume: bool) -> None:
        """Start MLflow's own thread for system metrics, anew where a failing store has ended it."""
        if self._system_seconds is None:
            return
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            if self._monitor is not None:
                self._monitor.finish()
            self._monitor = SystemMetricsMonitor(
                self.run_id,
                sampling_interval=self._system_seconds,
                resume_logging=resume,
                tracking_uri=self._client.tracking_uri,
            )
            self._monitor.start()
        except Exception as error:  # the machine's figures are not worth a run
            log.warning("system metrics are not logged: %s", self._shown(one_line(error)))

    def _table_so_far(self, name: str, columns: tuple[str, ...]) -> list[list[Any]]:
        with tempfile.TemporaryDirectory() as folder, suppress(Exception):
            # A table that is missing or damaged costs the older rows, not the training.
            path = self._client.download_artifacts(self.run_id, name, folder)
            table = json.loads(Path(path).read_text(encoding="utf-8"))
            if table["columns"] == list(columns):
                return list(table["data"])
        return []

    def _take_up_ages(self, resumed_from: int) -> None:
        """Find the ages that are stored, and send those that wait."""
        assert self._outbox is not None
        self._stored = {row[0]: row for row in self._table_so_far(AGE_TABLE, AGE_COLUMNS)}
        self._aged = set(self._stored)
        for folder in sorted((self._out / AGES).glob("step-*")):
            if folder.suffix:  # a kill came before it was whole
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self._aged.add(int(folder.name.removeprefix("step-")))
                self._outbox.add_file(f"{AGES}/{folder.name}", "")
        newest = max(self._aged, default=-1)
        self._repeated = newest if newest > resumed_from else -1

    def _take_up_unsent(self) -> None:
        """Send what an earlier part of this run could not; points that the store has are not doubled."""
        assert self._outbox is not None
        try:
            points, files = read_leftover(self._unsent)
            if STORIES in files:
                self._rows = list(json.loads(files[STORIES])["data"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read: %s", self._unsent.name, one_line(error))
            return
        self._outbox.add(points)
        for path, text in files.items():
            self._outbox.add_file(path, text)

    def _keep_unsent(self, leftover: Leftover[Point]) -> None:
        if leftover.dropped:
            message = "MLflow run %s lacks %d points: its store was gone for too long"
            log.warning(message, self.run_id, leftover.dropped)
        counted = f"{len(leftover.items)} points and {len(leftover.files)} files did not reach MLflow"
        try:
            if not leftover.items and not leftover.files:
                self._unsent.unlink(missing_ok=True)
                return
            write_leftover(self._unsent, leftover)
        except OSError as error:
            log.warning("%s and are lost: %s", counted, one_line(error))
        else:
            log.warning("%s; a resume sends them from %s", counted, self._unsent.name)


def write_leftover(path: Path, leftover: Leftover[Point]) -> None:
    """Write what was not sent, one point or file a line; the file is replaced atomically."""
    lines = [json.dumps({"point": point}) for point in leftover.items]
    lines += [json.dumps({"path": name, "text": text}) for name, text in leftover.files.items()]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_leftover(path: Path) -> tuple[list[Point], dict[str, str]]:
    """Read what `write_leftover` wrote; a damaged file raises `ValueError`, `TypeError` or `KeyError`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [Point(*line["point"]) for line in lines if "point" in line]
    return points, {line["path"]: line["text"] for line in lines if "point" not in line}


COLUMNS = ("step", "tokens", "loss", "bits_per_byte", "prompt", "continuation")
"""Of the table of sample stories."""


def samples_page(report: EvaluationReport) -> str:
    """The sample stories of one evaluation as Markdown."""
    best = ", the best so far" if report.best else ""
    lines = [
        f"# Step {report.step:,}",
        "",
        f"{report.tokens:,} tokens seen; validation loss {report.loss:.4f} nats a token, "
        f"{report.bits_per_byte:.4f} bits per byte{best}.",
    ]
    for number, (prompt, continuation) in enumerate(report.samples, start=1):
        story = (prompt + continuation).splitlines() or [""]
        lines += ["", f"## Story {number}", "", *(f"> {line}".rstrip() for line in story)]
    return "\n".join(lines) + "\n"


def samples_rows(report: EvaluationReport) -> list[list[Any]]:
    """The same as rows of `COLUMNS`, one a story; JSON has no NaN, so such a figure is `None`."""
    figures = [value if math.isfinite(value) else None for value in (report.loss, report.bits_per_byte)]
    return [[report.step, report.tokens, *figures, *sample] for sample in report.samples]


MODEL_NAME = "story-writer"
DIGEST = "checkpoint.digest"
"""Tag: SHA-256 of the weights' file, which a run that starts from this checkpoint names as its `init`."""
INHERITED = ("git.sha", "git.dirty", "data.digest")
"""Tags of the run that its model carries too."""


def log_checkpoint(client: "MlflowClient", run_id: str, checkpoint: Path) -> None:
    """Store the files of `checkpoint` (a folder) as a logged model of the run.

    After a resume that found nothing better the same checkpoint is there already, and is not stored twice.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.get_run(run_id)
    digest = file_sha256(checkpoint / "model.safetensors")
    stored = [output.model_id for output in run.outputs.model_outputs] if run.outputs else []
    if any(client.get_logged_model(model_id).tags.get(DIGEST) == digest for model_id in stored):
        return
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
        of_data = {} if data is None else {"dataset_name": data.name, "dataset_digest": data.digest}
        about = {"model_id": model.model_id, "run_id": run_id, **of_data}
        metrics = [
            Metric(metric.key, metric.value, metric.timestamp, metric.step, **about) for metric in (best, *of_this_step)
        ]
        client.log_batch(run_id, metrics=metrics, synchronous=True)
