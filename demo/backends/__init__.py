"""The backends that the page can write with, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.backend import Backend, LocalBackend
from model.errors import InputError

if TYPE_CHECKING:
    from model.settings import Settings


def open_backend(kind: str, settings: Settings) -> Backend:
    """The backend called `kind`: `local`, or `auto` for the best there is. Raises `InputError` on others."""
    if kind not in ("auto", "local"):
        raise InputError("backend", f"must be auto or local, got {kind!r}")
    return LocalBackend.load(settings)
