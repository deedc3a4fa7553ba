"""The process that reads MLflow for the page: a question a line on standard input, an answer a line on standard output.

Questions are JSON: `{"ask": "overview"}`, `{"ask": "curves", "runs": [ID, …], "measure": "held-out"}`,
`{"ask": "samples", "run": ID}`. An answer holds `answer`, or `error`: one line for the log. The process ends with its
input, so it never outlives the one that started it, and has a low priority.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from model.errors import StoryError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from experiments.dashboard.records import DecisionRow

NICENESS = 10
"""Added to the process's niceness."""


class StoreReader:
    """Answers questions about the store at `uri`, which is opened at the first one."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: MlflowClient | None = None
        self._decisions: dict[str, DecisionRow] = {}

    def answer(self, question: dict[str, Any]) -> Any:
        """Return records. Raises `StoryError` for an unusable store, else whatever MLflow raises."""
        from experiments.dashboard import rows
        from training.tracking.store import open_store

        if self._client is None:
            self._client = open_store(self._uri, read_only=True)
        match question:
            case {"ask": "overview"}:
                return rows.overview(self._client, self._decisions)
            case {"ask": "curves", "runs": runs, "measure": measure}:
                return rows.curves(self._client, runs, measure)
            case {"ask": "samples", "run": run}:
                return rows.sample_sets(self._client, run)
        raise ValueError(f"not a question: {question}")


def reply(store: StoreReader, line: str) -> str:
    """Answer a line with a line."""
    try:
        return json.dumps({"answer": to_jsonable_python(store.answer(json.loads(line)))}, allow_nan=False)
    except StoryError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        return json.dumps({"error": f"{type(error).__name__}: {one_line(error)}"})


def main() -> None:
    """Answer until the input ends."""
    from model.settings import load_settings

    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    # What a library prints must not stand among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    store = StoreReader(load_settings().mlflow_tracking_uri)
    for line in sys.stdin:
        print(reply(store, line), file=answers, flush=True)


if __name__ == "__main__":
    main()
