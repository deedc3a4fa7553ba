"""The database of told stories: opened, brought to its newest form, written to.

SQLite by default, in write-ahead mode so that a report can be read while stories are being written, and PostgreSQL
where replicas on several machines share it. SQLAlchemy takes 0.7 s to import, so whatever serves imports this file
only in the thread that writes (`recorder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from experiments.ab.address import ALLOWED, check_address, sqlite_file
from experiments.ab.events import Ending, Event, Exposure, Rating
from experiments.ab.tables import HEAD, VERSION_TABLE, endings, exposures, ratings
from model.errors import InputError, one_line
from model.settings import without_password

BUSY = 5_000
"""Milliseconds that a writer waits for another process's turn with the file to end."""
CONNECT = 5
"""Seconds for PostgreSQL to answer."""
LOCK = 0x57027
"""Number of the lock under which PostgreSQL is migrated: two replicas may start together."""
MIGRATIONS = Path(__file__).with_name("migrations")
TABLES: dict[type[Event], sa.Table] = {Exposure: exposures, Ending: endings, Rating: ratings}


def connect(address: str, *, writes: bool) -> sa.Engine:
    """An engine for `address`; nothing is opened yet.

    Raises:
        InputError: the address is of no known kind. `MissingExtraError`: PostgreSQL's driver is not installed.
    """
    check_address(address)
    if sqlite_file(address) is not None:
        # No pool: a file that was taken away or put back is then noticed at the next batch.
        engine = sa.create_engine(address, poolclass=sa.pool.NullPool)
        _prepare_sqlite(engine, "BEGIN IMMEDIATE" if writes else "BEGIN")
        return engine
    rest = address.partition("://")[2]
    try:
        return sa.create_engine(
            f"postgresql+psycopg://{rest}", pool_pre_ping=True, connect_args={"connect_timeout": CONNECT}
        )
    except (sa.exc.ArgumentError, ValueError):  # its own message may hold the password
        raise InputError("DATABASE_URL", f"{ALLOWED}, got {without_password(address)}") from None


def migrate(engine: sa.Engine, to: str = HEAD) -> None:
    """Bring the database to revision `to`, each replica after the other, in one transaction.

    Raises `InputError` when a newer program has brought it further than this one knows.
    """
    if (file := sqlite_file(engine.url.render_as_string(hide_password=False))) is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    if to == HEAD and revision(engine) == HEAD:
        return
    import alembic.command
    import alembic.util
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        config.attributes["connection"] = connection
        try:
            alembic.command.upgrade(config, to)
        except alembic.util.CommandError as error:
            raise InputError(
                "DATABASE_URL", f"names a database of a newer version of this project ({one_line(error)})"
            ) from None


def revision(engine: sa.Engine) -> str | None:
    """The revision of the database; None for an empty one."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        found = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
        return None if found is None else str(found)


def store(engine: sa.Engine, events: Sequence[Event]) -> None:
    """Add events in one transaction; those that are there already are left as they are.

    So a batch whose success was never heard of can be sent again.
    """
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    with engine.begin() as connection:
        for kind, table in TABLES.items():
            if rows := [_row(event) for event in events if isinstance(event, kind)]:
                connection.execute(insert(table).on_conflict_do_nothing(), rows)


def _row(event: Event) -> dict[str, Any]:
    # PostgreSQL's texts hold no zero byte.
    return {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value
        for name, value in asdict(event).items()
    }


def _prepare_sqlite(engine: sa.Engine, begin: str) -> None:
    """Write-ahead mode, patience, and transactions that begin when SQLAlchemy says so.

    The driver's own way begins them late, and a transaction that reads first may then not wait for its turn to write.
    """

    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in (f"busy_timeout = {BUSY}", "journal_mode = WAL", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {pragma}").close()

    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
