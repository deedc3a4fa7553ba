"""Which of two deployments writes new stories: the one small record that every replica of the demo reads.

Two deployments, `blue` and `green`, stand side by side. New stories go to the active one; a switch changes this
record and nothing else, so a story that is being written keeps the connection it has and ends where it began.

    store = open_colours(settings)
    url = store.endpoint(settings.modal_endpoint_url)    # for each new story

The record lives in Redis (key `story:colours`) when `REDIS_URL` is set, so that demos on several machines see one
switch at once; otherwise in a file, which the demos of one machine share. Reading is cheap enough for each story
and never fails: while the store cannot be read, the last known record stands. Writing reads afresh, and changes
nothing when another writer was faster or the store is gone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from model.errors import InputError, StoryError

if TYPE_CHECKING:
    from model.settings import Settings

Colour = Literal["blue", "green"]
COLOURS: tuple[Colour, Colour] = ("blue", "green")

log = logging.getLogger(__name__)


class ColoursError(StoryError):
    """The record cannot be read or written, or does not allow what was asked."""

    exit_code = 1


def other(colour: Colour) -> Colour:
    """The colour that is not `colour`."""
    return "green" if colour == "blue" else "blue"


def colour_named(name: str) -> Colour:
    """`name` as a colour. Raises `InputError`."""
    if name not in COLOURS:
        raise InputError("colour", f"must be one of {', '.join(COLOURS)}, got {name!r}")
    return name


def _nothing() -> dict[Colour, str | None]:
    return {"blue": None, "green": None}


@dataclass(frozen=True, slots=True)
class Colours:
    """The record. Each change makes a new one, one `generation` further."""

    active: Colour
    """Where new stories go."""
    urls: dict[Colour, str | None] = field(default_factory=_nothing)
    """Address of each deployment that passed its check; None: there is none, or it did not pass."""
    versions: dict[Colour, str | None] = field(default_factory=_nothing)
    """Digest of the model folder that each one serves."""
    previous: Colour | None = None
    """What was active before the last switch, if it still runs: where `rolled_back` leads."""
    changed: float = 0.0
    """When this record was made, in seconds since 1970 (UTC)."""
    generation: int = 0
    """Counts changes, from 1."""

    @property
    def idle(self) -> Colour:
        """The colour that new versions are deployed to."""
        return other(self.active)

    @property
    def url(self) -> str | None:
        """Where new stories go."""
        return self.urls[self.active]

    def switched(self, to: Colour) -> Colours:
        """New stories go to `to`. Raises `ColoursError` when nothing proven runs there."""
        if self.urls[to] is None:
            raise ColoursError(f"{to} has no deployment that passed its check: run `story deploy deploy`")
        if to == self.active:
            return self
        return self._next(active=to, previous=self.active)

    def rolled_back(self) -> Colours:
        """New stories go where they went before the last switch. Raises `ColoursError` if that is gone."""
        if self.previous is None:
            raise ColoursError("there is nothing to roll back to: what ran before the last switch is gone")
        return self.switched(self.previous)

    def placed(self, colour: Colour, url: str | None, version: str | None) -> Colours:
        """`colour` has a deployment at `url`; None for `url` takes it away, as before it is replaced."""
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InputError("url", f"must be an http(s) address, got {url!r}")
        version = version if url is not None else None
        replaced = colour == self.previous and version != self.versions[colour]
        return self._next(
            urls={**self.urls, colour: url and url.rstrip("/")},
            versions={**self.versions, colour: version},
            previous=None if replaced else self.previous,
        )

    def _next(self, **changes: Any) -> Colours:
        return replace(self, **changes, changed=time.time(), generation=self.generation + 1)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, and the form in which it is stored."""
        return asdict(self)


def parse(text: str | bytes, where: str) -> Colours:
    """The record out of its stored form. Raises `ColoursError` that names `where`."""
    try:
        values = json.loads(text)
        record = Colours(**values)
        for both, pattern in ((record.urls, r"https?://\S+"), (record.versions, r"\S+")):
            if set(both) != set(COLOURS) or not all(
                value is None or re.fullmatch(pattern, value) for value in both.values()
            ):
                raise ValueError("blue and green do not both have a text or null")
        if record.active not in COLOURS or record.previous not in (*COLOURS, None):
            raise ValueError("no such colour")
        if type(record.generation) is not int or type(record.changed) not in (int, float):
            raise ValueError("no such number")
        if not math.isfinite(record.changed):
            raise ValueError("no such time")
    except (TypeError, OverflowError, ValueError, AttributeError, RecursionError) as error:
        raise ColoursError(f"{where} does not hold a record of colours: {error}") from None
    return record


Change = Callable[[Colours | None], Colours]
"""Makes the next record out of the one that stands; the same one means that nothing changes."""


class ColourStore(ABC):
    """Where the record lives. Safe for any number of readers and writers, in threads and in processes."""

    where: str
    """Name of the place, as it may be shown."""

    known: Colours | None = None
    """What `read` last saw."""
    _in_trouble = False

    @abstractmethod
    def load(self) -> Colours | None:
        """The record as it stands now; None: nothing was deployed yet. Raises `ColoursError`."""

    @abstractmethod
    def look(self) -> Colours | None:
        """As `load`, but as cheap as can be: for readers. Raises `ColoursError`."""

    @abstractmethod
    def change(self, how: Change) -> Colours:
        """Replace the record by `how` of it, unless another writer comes between. Raises `ColoursError`."""

    def read(self) -> Colours | None:
        """The record; the last known one while the store cannot be read. Raises nothing.

        With a file this costs one `stat`; with Redis one GET, of at most 0.2 s, on the calling thread.
        """
        try:
            self.known = self.look()
        except ColoursError as error:
            if not self._in_trouble:
                log.warning("%s; new stories go where they went before", error)
            self._in_trouble = True
        else:
            self._in_trouble = False
        return self.known

    def endpoint(self, default: str | None) -> str | None:
        """Where a new story goes: the active colour's address, or `default` where there is none."""
        record = self.read()
        return default if record is None or record.url is None else record.url

    def switch(self, to: Colour | None = None) -> Colours:
        """Send new stories to `to` (None: to the idle colour). Raises `ColoursError`."""

        def how(record: Colours | None) -> Colours:
            if record is None:
                raise ColoursError("nothing is deployed yet: run `story deploy deploy`")
            return record.switched(record.idle if to is None else to)

        return self.change(how)

    def rollback(self) -> Colours:
        """Undo the last switch. Raises `ColoursError`."""

        def how(record: Colours | None) -> Colours:
            if record is None:
                raise ColoursError("there is nothing to roll back to: nothing is deployed yet")
            return record.rolled_back()

        return self.change(how)

    def set_colour(self, colour: Colour, url: str | None, version: str | None) -> Colours:
        """Note what runs as `colour`, None for nothing. The first one ever is active: nothing else could be."""
        return self.change(lambda record: (record or Colours(active=colour)).placed(colour, url, version))


def state_folder() -> Path:
    """The project's folder among the user's state: the same one, wherever a command is run."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "write-me-a-story"


def open_colours(settings: Settings) -> ColourStore:
    """The store that the settings name. Raises `InputError` for an unusable `REDIS_URL`."""
    from model.serving.deployments.colour_stores import FileColours, RedisColours  # they know this file

    if settings.redis_url is not None:
        return RedisColours(settings.redis_url.get_secret_value())
    path = Path(settings.story_colours) if settings.story_colours else state_folder() / "colours.json"
    return FileColours(path)
