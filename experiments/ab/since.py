"""`--since`: a day, a moment, or how long ago."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from model.errors import InputError

UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
ALLOWED = "must be a day (2026-11-03), a moment (2026-11-03T08:00) or how long ago (90m, 12h, 7d, 2w)"


def parse_since(text: str, now: datetime | None = None) -> float:
    """Seconds since 1970 (UTC) of the moment that `text` names; without a zone it is UTC. Raises `InputError`."""
    if ago := re.fullmatch(r"(\d{1,5})([mhdw])", text):
        span = timedelta(**{UNITS[ago[2]]: int(ago[1])})
        return ((now or datetime.now(UTC)) - span).timestamp()
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise InputError("since", f"{ALLOWED}, got {text[:60]!r}") from None
