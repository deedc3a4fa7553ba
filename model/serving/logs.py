"""Lines of the log that a machine can read: one JSON object each, with the name of the request that they belong to.

The name is the one that the client gets as `x-request-id`. What a story or its prompt says is in no line.
"""

from __future__ import annotations

import logging
import sys
import uuid
from contextvars import ContextVar
from typing import TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request at hand; tasks that are started for it inherit it."""


class _Named(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request_id.get() or None
        return True


class _Told(logging.Filter):
    """Of the project's own lines all; of a library's, what is at least a warning."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "story"


def new_request_id() -> str:
    """A name that no other request has."""
    return uuid.uuid4().hex


def configure_logs(kind: str, to: TextIO | None = None) -> logging.Handler | None:
    """Write JSON lines to `to` (stderr) where `kind` is `json`; else leave Python's own way, warnings as text."""
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
    handler.addFilter(_Told())
    handler.addFilter(_Named())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("story").setLevel(logging.INFO)
    for name in (
        "uvicorn",
        "uvicorn.error",
        "uvicorn.access",
    ):  # they would write beside it, in a form of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    return handler
