"""The event store on real SQLite: created, migrated, written to by several processes, and read meanwhile."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from experiments.ab.events import Event, Rating, hashed
from experiments.ab.store import (
    HEAD,
    MIGRATIONS,
    VERSION_TABLE,
    connect,
    endings,
    exposures,
    insert_events,
    metadata,
    migrate,
    ratings,
    revision,
)
from model.errors import InputError, MissingExtraError
from tests.experiments.ab.events import ending, exposure, users

ADDRESS = "sqlite:///there/stories.db"

WRITER = """
import sys
from experiments.ab.store import connect, insert_events, migrate
from tests.experiments.ab.events import users

engine = connect(sys.argv[1], writes=True)
print("ready", flush=True)
sys.stdin.readline()
migrate(engine)
events = list(users(200, {"champion": 0.5, "challenger": 0.5}, seed=int(sys.argv[2])))
for start in range(0, len(events), 6):
    insert_events(engine, events[start : start + 6])
"""


@pytest.fixture
def engine() -> sa.Engine:
    engine = connect(ADDRESS, writes=True)
    migrate(engine)
    return engine


def count(engine: sa.Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_migrating_an_empty_database_gives_the_tables_of_the_program(engine: sa.Engine) -> None:
    assert revision(engine) == HEAD
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_the_program_names_the_newest_revision() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_migrating_again_changes_nothing_and_loads_no_alembic(engine: sa.Engine, repository: Path) -> None:
    program = (
        "import sys\nfrom experiments.ab.store import connect, migrate\n"
        f"migrate(connect({ADDRESS.replace('there', str(Path('there').resolve()))!r}, writes=True))\n"
        "assert 'alembic' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert revision(engine) == HEAD


def test_a_database_of_another_program_is_one_line(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(InputError, match=r"DATABASE_URL names a database of another version .*9999"):
        migrate(engine)


def test_the_same_events_sent_twice_are_there_once(engine: sa.Engine) -> None:
    events: list[Event] = [exposure("a"), ending("a"), Rating(story="a", rating=1)]
    insert_events(engine, events)
    insert_events(engine, events[::-1])
    assert {count(engine, table) for table in (exposures, endings, ratings)} == {1}


def test_two_processes_that_start_and_write_together_lose_nothing(engine: sa.Engine, repository: Path) -> None:
    address = f"sqlite:///{Path('both.db').resolve()}"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    commands = [[sys.executable, "-c", WRITER, address, str(seed)] for seed in (1, 2)]
    writers = [subprocess.Popen(command, cwd=repository, text=True, **pipes) for command in commands]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both find an empty database and want to make the tables
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert (writer.returncode, errors) == (0, "")
    both = connect(address, writes=False)
    assert [count(both, table) for table in (exposures, endings, ratings)] == [400, 400, 400]


def test_a_report_is_read_while_a_writer_is_in_the_middle(engine: sa.Engine) -> None:
    insert_events(engine, list(users(5, {"champion": 1, "challenger": 1})))
    with engine.begin() as writing:
        writing.execute(ratings.insert().values(key="k", story="s", at=1.0, rating=1))
        assert count(connect(ADDRESS, writes=False), ratings) == 5
    assert count(engine, ratings) == 6


def test_a_zero_byte_in_a_prompt_does_not_lose_the_story(engine: sa.Engine) -> None:
    insert_events(engine, [dataclasses.replace(exposure("a"), prompt="A fox\0 came")])
    with engine.connect() as connection:
        assert connection.execute(sa.select(exposures.c.prompt)).scalar_one() == "A fox\ufffd came"


@pytest.mark.parametrize("address", ["stories.db", "mysql://lily:hunter2@db/x", "sqlite:///", "postgresql://"])
def test_an_unknown_kind_of_database_is_shown_without_its_password(address: str) -> None:
    with pytest.raises(InputError, match=r"DATABASE_URL must be sqlite:///FILE or postgresql://") as caught:
        connect(address, writes=False)
    assert "hunter2" not in str(caught.value)


def test_a_missing_driver_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # The driver is installed where the tests run; only its absence can be made up.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"PostgreSQL .* needs the 'postgres' packages"):
        connect("postgresql://lily:hunter2@db/x", writes=True)


def test_a_users_hash_depends_on_the_salt_and_reveals_nothing() -> None:
    assert hashed("lily", "salt") == hashed("lily", "salt") != hashed("lily", "pepper")
    assert hashed("lily", "") != hashed("rose", "")
    assert len(hashed("lily", "")) == 32
