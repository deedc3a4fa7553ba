"""Where studies are kept: SQLite beside the MLflow store, or PostgreSQL, where many machines can share one.

In PostgreSQL they get a schema of their own, because Optuna's tables have names that others use too
(`alembic_version`).
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import InputError, MissingExtraError, one_line
from model.settings import Settings, without_password
from training.tracking.store import database_file

if TYPE_CHECKING:
    import optuna

SCHEMA = "story_sweep"
HEARTBEAT, GRACE = 10, 120
"""Seconds between two signs of life of a trial, and after the last of them until it is given up."""
PATIENCE = 60
"""Seconds to wait for another worker's lock on the SQLite file."""
ATTEMPTS = 5
MADE_MEANWHILE = ("already exists", "UNIQUE constraint failed", "duplicate key")
"""What a database says where another process makes the same tables at this very moment."""


def storage_url(given: str | None, settings: Settings) -> str:
    """`given`, else a PostgreSQL `DATABASE_URL`, else `sweeps.db` beside the MLflow database."""
    if given:
        return given
    if settings.database_url is not None:
        url = settings.database_url.get_secret_value()
        if url.startswith("postgres"):
            return url
    store = database_file(settings.mlflow_tracking_uri)
    folder = Path() if store is None else Path(os.path.relpath(store.parent))
    return f"sqlite:///{folder / 'sweeps.db'}"


def open_storage(
    url: str, on_stale: Callable[[optuna.Study, optuna.trial.FrozenTrial], None] | None = None
) -> optuna.storages.RDBStorage:
    """Connect, and make the tables where there are none. `on_stale` is told trials that were given up.

    Raises:
        InputError: no usable database answers there. MissingExtraError: Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise MissingExtraError("story sweep", "train") from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # what happens to a trial is told by us
    wanted = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    if not wanted.startswith(("sqlite:///", "postgresql+psycopg://")):
        raise InputError("storage", "must begin with sqlite:/// or postgresql://")
    for left in reversed(range(ATTEMPTS)):
        try:
            return _connect(wanted, on_stale)
        except Exception as error:  # SQLAlchemy's, Optuna's, the driver's or the network's
            if left and any(words in str(error) for words in MADE_MEANWHILE):
                time.sleep(0.5)  # another process is making the tables at this very moment
                continue
            reason = one_line(error).replace(wanted, without_password(url))
            raise InputError("storage", f"{without_password(url)} cannot be used ({reason})") from None
    raise AssertionError("the last attempt returns or raises")


def _connect(
    url: str, on_stale: Callable[[optuna.Study, optuna.trial.FrozenTrial], None] | None
) -> optuna.storages.RDBStorage:
    import optuna

    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": PATIENCE}}
    else:
        _make_schema(url)
        from sqlalchemy.pool import NullPool

        # A trial trains for hours, in which a server may end what says nothing: nothing is held between two questions.
        options = {"poolclass": NullPool, "connect_args": {"options": f"-csearch_path={SCHEMA}"}}
    with warnings.catch_warnings():
        # Heartbeats count as experimental in Optuna, since 2021.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(
            url, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE,
            heartbeat_stale_trial_callback=on_stale,
        )  # fmt: skip


def _make_schema(url: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    finally:
        engine.dispose()
