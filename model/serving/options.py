"""Options of the HTTP service."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.errors import InputError
from model.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Options of one process; the defaults suit one on this machine."""

    name: str = ""
    """Name of this deployment (`blue`), sent in `x-story-backend` and by the health route; empty: the backend's."""
    max_body: int = 65_536
    """Largest body in bytes; a larger one is refused with 413."""
    drain: float = 30.0
    """Seconds that running stories get to finish when the service stops."""
    keep_alive: float = 5.0
    """Seconds of silence after which an event stream carries a comment, so that no proxy closes it."""
    origins: tuple[str, ...] = ()
    """Other sites whose pages may call the API."""
    root_path: str = ""
    """Path under which a proxy publishes the application, such as `/stories`."""
    mcp: bool = False
    """The page's public endpoints are tools over the Model Context Protocol too."""
    metrics_token: str | None = None
    """Token that `/metrics` asks for; None: it answers requests of this machine only."""
    public: bool = False
    """Everyone can reach every route (a share link): `/metrics` answers with the token only."""

    def __post_init__(self) -> None:
        # It goes into a header.
        if not re.fullmatch(r"[A-Za-z0-9._-]{0,40}", self.name):
            raise InputError("name", f"must be at most 40 letters, digits, dots, - and _, got {self.name!r}")

    @classmethod
    def from_settings(cls, settings: Settings, *, name: str = "") -> ServiceOptions:
        """Return the options of the settings."""
        token = settings.story_metrics_token
        return cls(
            name=name,
            max_body=settings.story_max_body,
            drain=settings.story_drain,
            origins=settings.story_origins or (),
            root_path=settings.story_root_path or "",
            mcp=settings.story_mcp,
            metrics_token=None if token is None else token.get_secret_value(),
        )
