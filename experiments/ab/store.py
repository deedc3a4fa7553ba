"""The database of events: its tables, and how it is opened, migrated and written to.

SQLite by default, in write-ahead mode so that a report can be read while events are written; PostgreSQL where replicas
on several machines share it. The serving path imports this module only in the recorder's background thread, because
SQLAlchemy takes 0.7 s to import.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, Float, Integer, SmallInteger, String, Table, Text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from experiments.ab.events import ALLOWED_DATABASE, Ending, Event, Exposure, Rating, Vote, check_database, sqlite_file
from model.errors import InputError, one_line
from model.settings import without_password

HEAD = "0004"
"""The newest migration, so that a program need not load Alembic to find the database up to date."""
VERSION_TABLE = "story_alembic_version"
"""Our own name, because MLflow keeps an `alembic_version` and may share the database."""
MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT = 5_000
"""Milliseconds to wait for another process's lock on the SQLite file."""
CONNECT_TIMEOUT = 5
"""Seconds for PostgreSQL to answer."""
MIGRATION_LOCK = 0x57027
"""Advisory lock held while PostgreSQL is migrated: two replicas may start together."""

_MIGRATING = threading.Lock()
"""Alembic's context is one for all threads, and the app both writes and reads."""

metadata = sa.MetaData()
_Id = sa.BigInteger().with_variant(Integer, "sqlite")

# `id` is the order of arrival; `at` is a machine's clock, and clocks differ. How a database comes to have these tables:
# `migrations/`.
exposures = Table(
    "story_exposures",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("story", String(64), nullable=False, unique=True),
    Column("at", Float(53), nullable=False, index=True),
    Column("test", String(200), nullable=False, index=True),
    Column("split", Text, nullable=False),
    Column("variant", String(200), nullable=False),
    Column("user_hash", String(32), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("version", String(40), nullable=False),
    Column("prompt", Text, nullable=True),
)
endings = Table(
    "story_endings",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("key", String(32), nullable=False, unique=True),
    Column("story", String(64), nullable=False, index=True),
    Column("at", Float(53), nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("ttft", Float(53), nullable=True),
    Column("duration", Float(53), nullable=False),
    Column("rate", Float(53), nullable=True),
    Column("served_by", String(40), nullable=False),
)
ratings = Table(
    "story_ratings",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("key", String(32), nullable=False, unique=True),
    Column("story", String(64), nullable=False, index=True),
    Column("at", Float(53), nullable=False),
    Column("rating", SmallInteger, nullable=False),
)
votes = Table(
    "story_votes",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("key", String(32), nullable=False, unique=True),
    Column("at", Float(53), nullable=False, index=True),
    Column("user_hash", String(32), nullable=False),
    Column("prompt_digest", String(64), nullable=False),
    Column("prompt", Text, nullable=True),
    Column("seed", sa.BigInteger, nullable=False),
    *(
        column
        for side in ("first", "second")
        for column in (
            Column(side, Text, nullable=False),
            Column(f"{side}_digest", String(64), nullable=False),
            Column(f"{side}_settings", Text, nullable=False),
            Column(f"{side}_story", String(64), nullable=False),
            Column(f"{side}_words", Integer, nullable=False),
            Column(f"{side}_read", Float(53), nullable=True),
        )
    ),
    Column("seconds", Float(53), nullable=False),
    Column("choice", String(20), nullable=False),
    Column("fault", String(40), nullable=False),
)
TABLES: dict[type[Event], Table] = {Exposure: exposures, Ending: endings, Rating: ratings, Vote: votes}


def connect(url: str, *, writes: bool) -> sa.Engine:
    """Return an engine for `url`; nothing is opened yet.

    Raises:
        InputError: the database is of an unknown kind. `MissingExtraError`: PostgreSQL's driver is not installed.
    """
    check_database(url)
    if sqlite_file(url) is not None:
        # No pool: a file that was removed or replaced is then noticed at the next batch.
        engine = sa.create_engine(url, poolclass=sa.pool.NullPool)
        _prepare_sqlite(engine, "BEGIN IMMEDIATE" if writes else "BEGIN")
        return engine
    rest = url.partition("://")[2]
    try:
        return sa.create_engine(
            f"postgresql+psycopg://{rest}", pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_TIMEOUT}
        )
    except (sa.exc.ArgumentError, ValueError):  # its own message may hold the password
        raise InputError("DATABASE_URL", f"{ALLOWED_DATABASE}, got {without_password(url)}") from None


@contextlib.contextmanager
def reading(url: str) -> Iterator[sa.Connection]:
    """Connect to an existing database, of the newest revision, for a `with` block that reads it.

    Raises `InputError` when it does not exist or cannot be used.
    """
    file = sqlite_file(url)
    if file is not None and not file.exists():
        raise InputError("DATABASE_URL", f"names {file}, which does not exist; `story demo` creates it")
    try:
        engine = connect(url, writes=False)
        try:
            migrate(engine)
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()
    except SQLAlchemyError as error:
        reason = one_line(error).partition(" [SQL:")[0]
        raise InputError("DATABASE_URL", f"{without_password(url)} cannot be used ({reason})") from None


def migrate(engine: sa.Engine) -> None:
    """Bring the database to revision `HEAD`, one replica after the other, in one transaction.

    Raises `InputError` when another version of the program has made it.
    """
    if (file := sqlite_file(engine.url.render_as_string(hide_password=False))) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    if revision(engine) == HEAD:
        return
    with _MIGRATING:
        if revision(engine) != HEAD:
            _upgrade(engine)


def _upgrade(engine: sa.Engine) -> None:
    import alembic.command
    import alembic.util
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        try:
            alembic.command.upgrade(config, HEAD)
        except alembic.util.CommandError as error:
            raise InputError(
                "DATABASE_URL", f"names a database of another version of this project ({one_line(error)})"
            ) from None


def revision(engine: sa.Engine) -> str | None:
    """Return the database's revision; None for an empty one."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        found = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
        return None if found is None else str(found)


def insert_events(engine: sa.Engine, events: Sequence[Event]) -> None:
    """Insert events in one transaction; existing ones are left as they are, so a batch can be sent again."""
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    with engine.begin() as connection:
        for kind, table in TABLES.items():
            if rows := [_row(event) for event in events if isinstance(event, kind)]:
                connection.execute(insert(table).on_conflict_do_nothing(), rows)


def _row(event: Event) -> dict[str, Any]:
    # PostgreSQL's text columns hold no zero byte.
    return {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value
        for name, value in asdict(event).items()
    }


def _prepare_sqlite(engine: sa.Engine, begin: str) -> None:
    """Set write-ahead mode and a lock timeout, and begin transactions when SQLAlchemy says so.

    The driver begins them late by itself, and a transaction that reads first may then not wait for a write lock.
    """

    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in (f"busy_timeout = {BUSY_TIMEOUT}", "journal_mode = WAL", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {pragma}").close()

    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
