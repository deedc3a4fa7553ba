"""What an operator chooses for one copy of the service."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.errors import InputError

if TYPE_CHECKING:
    from model.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """See the fields; the defaults suit a copy on this machine."""

    name: str = ""
    """Which copy this is (`blue`), told in `x-story-backend` and by the health route; empty: who writes is told."""
    max_body: int = 65_536
    """Bytes of a request's body; a longer one is refused with 413."""
    drain: float = 30.0
    """Seconds that running stories get when the service is told to end."""
    keep_alive: float = 5.0
    """Seconds of silence after which an event stream carries a comment, so that no proxy takes it for dead."""

    origins: tuple[str, ...] = ()
    """Other sites whose pages may ask."""
    metrics_token: str | None = None
    """What `/metrics` asks for; None: it answers requests of this machine only."""
    public: bool = False
    """Everyone can reach every route (a share link): `/metrics` is there for holders of the token only."""

    def __post_init__(self) -> None:
        # It goes into a header.
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,40}", self.name):
            raise InputError("name", f"must be at most 40 letters, digits, dots, - and _, got {self.name!r}")

    @classmethod
    def from_settings(cls, settings: Settings, *, name: str = "") -> ServiceOptions:
        """The options that the environment's settings say."""
        token = settings.story_metrics_token
        return cls(
            name=name,
            max_body=settings.story_max_body,
            drain=settings.story_drain,
            origins=settings.story_origins or (),
            metrics_token=None if token is None else token.get_secret_value(),
        )
