"""Answers as the process that reads would give them, in this process; they go through JSON here too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from experiments.dashboard.__main__ import Reading, reply
from experiments.dashboard.absent import why_absent
from experiments.dashboard.reader import UnreadableError
from experiments.dashboard.records import Curve, Moment, Overview


class DirectReader:
    """A reader without a process of its own."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._reading = Reading(uri)

    async def overview(self, *, known: bool = False) -> Overview:
        return Overview.of(self._answer({"ask": "overview"}))

    async def curves(self, runs: Sequence[str], measure: str) -> list[Curve]:
        question = {"ask": "curves", "runs": list(runs), "measure": measure}
        return [Curve.of(curve) for curve in self._answer(question)]

    async def moments(self, run: str) -> list[Moment]:
        return [Moment.of(moment) for moment in self._answer({"ask": "moments", "run": run})]

    def _answer(self, question: dict[str, Any]) -> Any:
        if (reason := why_absent(self._uri)) is not None:
            raise UnreadableError(reason)
        told = json.loads(reply(self._reading, json.dumps(question)))
        if "error" in told:
            raise UnreadableError(told["error"])
        return told["answer"]
