"""The events that a test records of each story: exposure, ending, and ratings.

Events are append-only, and each stands alone: any number of processes may write them, and retry after a failure. No
event holds any text except the prompt, and that only where it is switched on.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["finished", "length", "stopped", "failed", "refused", "aborted"]
"""`finished`: the model ended the story. `length`: `max_tokens` was reached. `stopped`: the user stopped it or
disconnected. `failed`: the backend failed. `refused`: the queue was full or a limit was reached. `aborted`: this
server shut down."""


def new_id() -> str:
    """Return a unique id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def hashed(user: str, salt: str) -> str:
    """Return the keyed hash that is stored instead of a user's id: 32 hexadecimal digits."""
    key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
    data = user.encode("utf-8", "surrogatepass")
    # The personalisation is part of every stored hash: with another one, returning users would count as new.
    return hashlib.blake2b(data, digest_size=16, key=key, person=b"story-user").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """A user's story was assigned to a variant."""

    story: str
    test: str
    split: str
    variant: str
    user_hash: str
    """See `hashed`."""
    digest: str
    """Of the model folder that serves."""
    version: str = ""
    """Number of the registered version, if it is one."""
    prompt: str | None = None
    """None where prompts are not kept."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """A generation ended. A story's first ending counts; later ones are continuations of it."""

    story: str
    outcome: Outcome
    tokens: int
    ttft: float | None
    """Seconds from request to first token; None if there was no token."""
    duration: float
    """Seconds from request to last token."""
    rate: float | None
    """Tokens per second after the first token."""
    served_by: str
    """The backend that served the end of the story: `local`, `modal`."""
    key: str = field(default_factory=new_id)
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """A user's verdict on a story: 1 thumb up, -1 thumb down, 0 taken back."""

    story: str
    rating: int
    key: str = field(default_factory=new_id)
    at: float = field(default_factory=time.time)


Event = Exposure | Ending | Rating
