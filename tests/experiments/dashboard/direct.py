"""Answers as the reading process would give them, in this process; they go through JSON here too."""

from __future__ import annotations

import json
from typing import Any

from experiments.dashboard.__main__ import StoreReader, reply
from experiments.dashboard.client import StoreClient, UnreadableError, why_absent


class DirectClient(StoreClient):
    """A client without a process of its own and without a cache."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._reader = StoreReader(uri)

    async def _answer(self, question: dict[str, Any], *, stale_ok: bool = False) -> Any:
        if (reason := why_absent(self._uri)) is not None:
            raise UnreadableError(reason)
        answered = json.loads(reply(self._reader, json.dumps(question)))
        if "error" in answered:
            raise UnreadableError(answered["error"])
        return answered["answer"]
