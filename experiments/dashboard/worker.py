"""Answer the page's questions about the store; `client` runs `ask` in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from typing import TYPE_CHECKING, Any, Literal

from model.errors import StoryError, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

Question = Literal["overview", "curves", "sample_sets"]
"""A function of `rows`."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Notice a server that is down before the user gives up.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
NICENESS = 10


def ask(uri: str, idle_timeout: float, question: Question, *arguments: Any) -> tuple[Any, str | None]:
    """Answer as `answer`, with a low priority; after `idle_timeout` seconds without a question this process ends."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    with contextlib.suppress(OSError):  # it is one already
        os.setsid()  # Ctrl-C in the terminal is for the app
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return answer(uri, question, *arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, idle_timeout)


def answer(uri: str, question: Question, *arguments: Any) -> tuple[Any, str | None]:
    """Return records, or None and in one line for the log why there are none."""
    try:
        from experiments.dashboard import rows

        return getattr(rows, question)(_opened(uri), *arguments), None
    except StoryError as error:
        return None, str(error)
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        return None, f"{type(error).__name__}: {one_line(error)}"


@functools.cache
def _opened(uri: str) -> MlflowClient:
    from training.tracking.store import open_store

    return open_store(uri, read_only=True)
