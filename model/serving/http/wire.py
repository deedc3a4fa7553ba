"""Bytes of JSON and of server-sent events, made in one place."""

from __future__ import annotations

import json
from typing import Any

EVENT_STREAM = "text/event-stream; charset=utf-8"
KEEP_ALIVE = b": still here\n\n"
"""A comment: every reader of events skips it, and every proxy sees that the connection lives."""
DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """Compact JSON in ASCII.

    ASCII, because some readers of event streams take U+2028 in a story for the end of a line, and because half
    a character that came in a request can then be named in the answer.
    """
    return _encode(value).encode("ascii")


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event; without a name it is a plain `data:` event, as OpenAI's clients expect."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, json_bytes(value))
