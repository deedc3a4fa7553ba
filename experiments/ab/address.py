"""Where told stories are stored, checked before anything that takes time is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError, MissingExtraError
from model.settings import without_password

if TYPE_CHECKING:
    from model.settings import Settings

DEFAULT = "sqlite:///stories.db"
"""In the working directory, beside MLflow's database."""
SQLITE = "sqlite:///"
ALLOWED = "must be sqlite:///FILE or postgresql://USER@HOST/NAME"


def address_of(settings: Settings) -> str:
    """The database that the settings name. Raises as `check_address` does."""
    given = settings.database_url
    address = DEFAULT if given is None else given.get_secret_value()
    check_address(address)
    return address


def check_address(address: str) -> None:
    """Raises `InputError` for an address of no known kind, `MissingExtraError` where its driver is not installed."""
    if (file := sqlite_file(address)) is not None and file.name:
        return
    scheme, _, rest = address.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg") or not rest:
        shown = without_password(address) if "://" in address else "something else"
        raise InputError("DATABASE_URL", f"{ALLOWED}, got {shown}")
    if importlib.util.find_spec("psycopg") is None:
        raise MissingExtraError("PostgreSQL (DATABASE_URL)", "postgres")


def sqlite_file(address: str) -> Path | None:
    """The file of a SQLite database; None for any other."""
    return Path(address.removeprefix(SQLITE).partition("?")[0]) if address.startswith(SQLITE) else None
