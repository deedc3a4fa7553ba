"""The process that reads MLflow for the page: a question a line on standard input, an answer a line on standard output.

Questions are JSON: `{"ask": "overview"}`, `{"ask": "curves", "runs": [ID, …], "measure": "held-out"}`,
`{"ask": "moments", "run": ID}`. An answer holds `answer`, or `error`: a line for the log. It ends with its input, so
that it never outlives whoever started it, and it gives way to every other process of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from model.errors import StoryError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from experiments.dashboard.records import DecisionRow

YIELDING = 10
"""Added to the process's niceness."""


class Reading:
    """Answers questions about the store at `uri`, opened at the first one."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client: MlflowClient | None = None
        self._decisions: dict[str, DecisionRow] = {}

    def answer(self, question: dict[str, Any]) -> Any:
        """Plain values. Raises `StoryError` for a store that cannot be used, else whatever MLflow raises."""
        from experiments.dashboard.judged import benchmark_rows, version_rows
        from experiments.dashboard.records import Overview, as_plain
        from experiments.dashboard.runs import curves, moments, run_rows
        from training.tracking.store import open_store

        if self._client is None:
            self._client = open_store(self._uri, read_only=True)
        client = self._client
        match question:
            case {"ask": "overview"}:
                runs, more = run_rows(client)
                return as_plain(
                    Overview(
                        runs=tuple(runs),
                        benchmarks=tuple(benchmark_rows(client)),
                        versions=tuple(version_rows(client, self._decisions)),
                        more=more,
                    )
                )
            case {"ask": "curves", "runs": runs, "measure": measure}:
                return [as_plain(curve) for curve in curves(client, runs, measure)]
            case {"ask": "moments", "run": run}:
                return [as_plain(moment) for moment in moments(client, run)]
        raise ValueError(f"not a question: {question}")


def reply(reading: Reading, line: str) -> str:
    """The answer to a line, as a line."""
    try:
        return json.dumps({"answer": reading.answer(json.loads(line))}, allow_nan=False)
    except StoryError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        return json.dumps({"error": f"{type(error).__name__}: {one_line(error)}"})


def main() -> None:
    """Answer until the input ends."""
    from model.settings import load_settings

    with contextlib.suppress(OSError):
        os.nice(YIELDING)
    # What a library prints must not stand among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    reading = Reading(load_settings().mlflow_tracking_uri)
    for line in sys.stdin:
        print(reply(reading, line), file=answers, flush=True)


if __name__ == "__main__":
    main()
