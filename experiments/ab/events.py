"""What is remembered of a told story: that it began, how it ended, and what its reader thought of it.

Events are only ever added, never changed, each by itself: whoever writes them, from any number of processes, can try
again after a failure, and whoever reads them twice finds the first reading's events again, with new ones behind them.
No event holds a text, but for the prompt, where that is switched on.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["finished", "length", "stopped", "failed", "refused", "cut"]
"""`finished`: the story told itself to its end. `length`: it met the length that was asked for. `stopped`: its reader
stopped it or went away. `failed`: the model or the way to it did. `refused`: there was no place. `cut`: this side
was shut down."""


def new_id() -> str:
    """An id that nothing else has: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def hashed(visitor: str, salt: str) -> str:
    """What is stored instead of a visitor's id: 32 hexadecimal digits, which lead back to it only by guessing."""
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    data = visitor.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, key=key, person=b"story-visitor").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """A reader's story was given to an arm."""

    story: str
    test: str
    split: str
    arm: str
    visitor: str
    """Hashed."""
    digest: str
    """Of the model folder that writes."""
    version: str = ""
    """Number of the registered version, where it is one."""
    prompt: str | None = None
    """None where prompts are not kept."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A story's telling came to an end. The first one of a story counts as its ending; later ones went on with it."""

    story: str
    outcome: Outcome
    tokens: int
    ttft: float | None
    """Seconds from request to first token; None where none came."""
    duration: float
    """Seconds from request to last token."""
    rate: float | None
    """Tokens a second after the first."""
    writer: str
    """Who wrote at the end: `local`, `modal`."""
    key: str = field(default_factory=new_id)
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """A reader pressed a thumb: 1 up, -1 down, 0 took it back."""

    story: str
    rating: int
    key: str = field(default_factory=new_id)
    at: float = field(default_factory=time.time)


Event = Exposure | Ending | Rating
