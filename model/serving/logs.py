"""JSON log lines that carry their request's id, the client's `x-request-id`. No line holds a story or prompt."""

import logging
import sys
import uuid
from contextvars import ContextVar
from typing import TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The current request; tasks that are started for it inherit it."""


def new_request_id() -> str:
    """Return a unique id."""
    return uuid.uuid4().hex


def _filter(record: logging.LogRecord) -> bool:
    """Add the request's id; keep all of the project's own records, and warnings of libraries."""
    record.request_id = getattr(record, "request_id", None) or request_id.get() or None
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "story"


def configure_logs(kind: str, to: TextIO | None = None) -> logging.Handler | None:
    """Write JSON lines to `to` (stderr) where `kind` is `json`; else leave Python's default, warnings as text."""
    if kind != "json":
        return None
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler(to or sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            ["asctime", "levelname", "name", "message", "request_id"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    )
    handler.addFilter(_filter)
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger("story").setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # they would write in a form of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return handler
