"""The events that are recorded (exposures, endings, ratings, votes), and the database they are stored in.

Events are append-only, and each stands alone: any number of processes may write them, and retry after a failure. No
event holds any text except the prompt, and that only where it is switched on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model.errors import InputError, MissingExtraError
from model.settings import without_password

if TYPE_CHECKING:
    from model.settings import Settings

DEFAULT_DATABASE = "sqlite:///stories.db"
"""In the working directory, beside MLflow's database."""
SQLITE = "sqlite:///"
ALLOWED_DATABASE = "must be sqlite:///FILE or postgresql://USER@HOST/NAME"


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


Choice = Literal["first", "second", "alike", "both bad"]
"""Which of two stories was preferred; `first` stood on the left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A user's choice between two stories from one prompt in the arena, not knowing which contestant wrote which."""

    user_hash: str
    """See `hashed`."""
    prompt_digest: str
    """SHA-256 of the prompt, in hexadecimal."""
    prompt: str | None = None
    """None where prompts are not kept."""
    seed: int
    first: str
    """The contestant whose story stood on the left, as it was configured."""
    first_digest: str
    """Of its model folder."""
    first_settings: str
    """All its settings, also those left at their defaults: two contestants are the same if digests and settings are."""
    first_story: str
    """SHA-256 of what it wrote, in hexadecimal."""
    first_words: int
    first_read: float | None
    """Seconds from the first word to when the end of this story had been seen, as the browser says; None: not seen."""
    second: str
    second_digest: str
    second_settings: str
    second_story: str
    second_words: int
    second_read: float | None
    seconds: float
    """From the first word to the vote, by the server's clock."""
    choice: Choice
    fault: str = ""
    """Why the vote is kept and not counted; empty for one that counts."""
    key: str = field(default_factory=new_id)
    """Id of the battle: a battle has one vote."""
    at: float = field(default_factory=time.time)


Event = Exposure | Ending | Rating | Vote


def database_url(settings: Settings) -> str:
    """Return the database that the settings name. Raises as `check_database` does."""
    given = settings.database_url
    url = DEFAULT_DATABASE if given is None else given.get_secret_value()
    check_database(url)
    return url


def check_database(url: str) -> None:
    """Raise `InputError` for an unknown kind of database, `MissingExtraError` if its driver is not installed."""
    if (file := sqlite_file(url)) is not None and file.name:
        return
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg") or not rest:
        shown = without_password(url) if "://" in url else "something else"
        raise InputError("DATABASE_URL", f"{ALLOWED_DATABASE}, got {shown}")
    if importlib.util.find_spec("psycopg") is None:
        raise MissingExtraError("PostgreSQL (DATABASE_URL)", "postgres")


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite database; None for any other database."""
    return Path(url.removeprefix(SQLITE).partition("?")[0]) if url.startswith(SQLITE) else None
