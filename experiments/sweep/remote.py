"""A trial in a container on Modal: the same training run, whose observers sit at the other end of a wire.

Only the sweep's own process has the study and the MLflow store, so nothing secret travels and no database has to be
open to the world. What the run reports goes up the wire; at each eighth of its budget it waits for a verdict to come
down. Where none comes, that process is gone: the run saves and stops, and does not go on costing money.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from experiments.sweep.trial import run_trial
from model.errors import DataError, StoryError
from training.tracking.provenance import Provenance, provenance
from training.trainer.observers import EndRun, EvaluationReport, RunEnd, RunStart, StepReport
from training.trainer.recipe import Recipe

PATIENCE = 120.0
"""Seconds to wait for a verdict."""
AT_ONCE = 500
"""Steps that are told in one message; a message may hold 1 MB."""


class Wire(Protocol):
    """`modal.Queue`, as far as it is used: messages in order, in partitions that know nothing of each other."""

    def put(self, v: Any, *, partition: str) -> None: ...

    def get(self, *, timeout: float, partition: str) -> Any:
        """Raises `queue.Empty` after `timeout` seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Begun:
    """The first message: how the run starts, and the code and machine that it runs on."""

    start: RunStart
    origin: Provenance


class Relay:
    """The observer, and judge, at the container's end. `commit` keeps what was written to the Volume."""

    def __init__(self, wire: Wire, key: str, commit: Callable[[], None]) -> None:
        self._wire, self._up, self._down, self._commit = wire, f"{key}.up", f"{key}.down", commit
        self._steps: list[StepReport] = []
        self._unsaved = False

    def started(self, start: RunStart) -> None:
        self._send(Begun(start, provenance()))

    def stepped(self, report: StepReport) -> None:
        self._steps.append(report)
        if len(self._steps) >= AT_ONCE:
            self._send_steps()
        if self._unsaved:  # the checkpoint that follows each evaluation is written by now
            self._unsaved = False
            self._commit()

    def evaluated(self, report: EvaluationReport) -> None:
        self._send_steps()
        self._send(report)
        self._unsaved = True

    def ended(self, end: RunEnd) -> None:
        self._send_steps()
        self._send(end)
        self._commit()

    def judge(self, part: int, bits: float) -> str | None:
        """Ask the sweep whether to go on."""
        self._send((part, bits))
        try:
            verdict: str | None = self._wire.get(timeout=PATIENCE, partition=self._down)
        except queue.Empty:
            raise EndRun("the sweep does not answer any more") from None
        return verdict

    def _send_steps(self) -> None:
        if self._steps:
            self._send(self._steps)
            self._steps = []

    def _send(self, message: Any) -> None:
        self._wire.put(message, partition=self._up)


def train(job: dict[str, Any], wire: Wire, root: Path, commit: Callable[[], None]) -> None:
    """Train the trial that `job` tells of, below `root`; how it ended is the last message.

    `job`: `key` of the wire, `recipe`, name of the `data`, and of the sweep's and the trial's folders.
    """
    data = root / "data" / job["data"]
    relay = Relay(wire, job["key"], commit)
    try:
        if not (data / "meta.json").is_file():
            raise DataError(
                f"the Volume holds no shards {job['data']}; `modal run -m deploy.modal_app::prepare` makes tinystories"
            )
        ended: object = run_trial(
            Recipe.from_dict(job["recipe"]), data=data, out=root / "sweeps" / job["sweep"] / job["folder"],
            judge=relay.judge, observers=[relay],
        )  # fmt: skip
    except StoryError as error:
        ended = str(error)  # as text: some of our errors do not travel
    wire.put(ended, partition=f"{job['key']}.up")
