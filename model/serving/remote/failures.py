"""What can go wrong between the page and the service on Modal, and who is told what of it.

A reader gets one plain line. An operator gets the reason, in the log and in the health report. Neither ever
contains a token, a password or more of a foreign answer than one short line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping

from model.errors import BusyError, InputError, StoryError

UNREACHABLE = "the story service on Modal does not answer at the moment"
UNWELCOME = "the story service on Modal does not let this page in; its operator can see why in the log"
BROKE_OFF = "the connection to the model on Modal was lost"
LONGEST_REASON = 200
USUAL_WAIT = 5.0
"""Seconds to wait after a 429 that names none."""


class RemoteError(StoryError):
    """The service did not do its part. As text it is the line for a reader; `reason` is for the operator."""

    exit_code = 1

    def __init__(
        self,
        reason: str,
        reader: str = UNREACHABLE,
        *,
        slow: bool = False,
        retryable: bool = False,
        trips_breaker: bool = True,
        told: StoryError | None = None,
    ) -> None:
        """Describe a failure.

        Args:
            reason: what happened, for the operator.
            reader: what happened, for the reader.
            slow: it took a time-out to notice, so each further try costs a reader that time.
            again: nothing has been written and the same request may well succeed in a moment.
            counts: it says something about the service, not about this one request.
            told: the error of the house that a reader should meet instead of this one.
        """
        super().__init__(reader)
        self.reason = one_line(reason)
        self.slow = slow
        self.retryable = retryable
        self.trips_breaker = trips_breaker
        self.told: StoryError = told or self


def one_line(text: str) -> str:
    """`text` without line breaks, and not longer than a line of a log should be."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 1]}…"


def from_exception(error: Exception, *, retryable: bool = False, slow: bool = False) -> RemoteError:
    """A failure of the connection itself."""
    return RemoteError(f"{type(error).__name__}: {error}".rstrip(": "), slow=slow, retryable=retryable)


def from_status(status: int, headers: Mapping[str, str], body: bytes) -> RemoteError:
    """What an answer other than 200 means."""
    message, param = _said(body)
    reason = f"HTTP {status}" + (f": {message}" if message else "")
    if status in (400, 413, 422):
        told = InputError(param, one_line(message.removeprefix(f"{param} "))) if param else None
        return RemoteError(
            reason,
            f"the story service on Modal did not take this: {one_line(message)}".rstrip(": "),
            trips_breaker=False,
            told=told,
        )
    if status in (401, 403):
        return RemoteError(f"{reason} (check MODAL_KEY and MODAL_SECRET)", UNWELCOME)
    if status == 429:
        wait = _seconds(headers.get("retry-after"))
        return RemoteError(reason, told=BusyError("every place on Modal is taken", retry_after=wait))
    return RemoteError(reason, retryable=status in (502, 503, 504))


def from_event(data: str) -> RemoteError:
    """What an error among the events of a stream means."""
    message, _ = _said(data.encode("utf-8", "replace"))
    return RemoteError(f"the service broke off: {message or 'it did not say why'}", BROKE_OFF)


def _said(body: bytes) -> tuple[str, str]:
    """(message, param) out of an error's JSON; empty where it holds none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
        error = value.get("error") if isinstance(value, dict) else None
        if isinstance(error, dict):
            message, param = error.get("message"), error.get("param")
            return (
                one_line(message) if isinstance(message, str) else "",
                param if isinstance(param, str) and param.isidentifier() else "",
            )
    return "", ""


def _seconds(text: str | None) -> float:
    """`Retry-After` in seconds, which may also be a date; between 1 s and 10 minutes."""
    try:
        return min(max(float(text or ""), 1.0), 600.0)
    except ValueError:
        return USUAL_WAIT
