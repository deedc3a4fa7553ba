"""Answers as the reading process would give them, in this process; they are pickled here too."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from experiments.dashboard import moves
from experiments.dashboard.client import Question, StoreClient, UnreadableError, answer, why_absent


class DirectClient(StoreClient):
    """A client without a process of its own and without a cache."""

    async def _answer(self, question: Question, *arguments: Any, stale_ok: bool = False) -> Any:
        if (reason := why_absent(self.uri)) is not None:
            raise UnreadableError(reason)
        found, error = answer(self.uri, question, *arguments)
        if error is not None:
            raise UnreadableError(error)
        return pickle.loads(pickle.dumps(found))

    async def move(self, thresholds: Path, action: moves.Action, version: str, plan: str) -> moves.Answer:
        found = moves.answer(self.uri, thresholds, action, version, plan)
        return moves.Answer(*pickle.loads(pickle.dumps(found)))
