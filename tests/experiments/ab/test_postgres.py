"""The store on a real PostgreSQL server, which the test starts for itself. Run by name: `-m slow`."""

from __future__ import annotations

import dataclasses
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from experiments.ab.database import connect, migrate, revision, store
from experiments.ab.recorder import Recorder
from experiments.ab.run import look
from experiments.ab.tables import HEAD, exposures, metadata
from tests.experiments.ab.events import exposure, readers

pytestmark = pytest.mark.slow
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """An empty server on the loopback. PostgreSQL refuses to run as root, so there it runs as its own user."""
    found = shutil.which("postgres")
    folder = Path(found).resolve().parent if found else next(iter(BINARIES), None)
    if folder is None:
        pytest.skip("PostgreSQL is not installed on this machine (Debian package: postgresql)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user: dict[str, Any] = {}
    place = Path(tempfile.mkdtemp(prefix="story-postgres-"))
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        user = {"user": account.pw_uid, "group": account.pw_gid}
        os.chown(place, account.pw_uid, account.pw_gid)
    data = str(place / "data")
    subprocess.run(
        [str(folder / "initdb"), "-D", data, "-U", "story", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, capture_output=True, cwd=place, **user,
    )  # fmt: skip
    server = subprocess.Popen(
        [str(folder / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(place), "-F"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=place, **user,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None
                threading.Event().wait(0.05)
        yield f"postgresql://story:hunter2@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # SIGTERM would wait for clients
        server.wait(30)
        shutil.rmtree(place, ignore_errors=True)


def test_replicas_that_start_together_migrate_once_and_lose_nothing(address: str) -> None:
    recorders = [Recorder(address, period=0.02) for _ in range(3)]
    events = list(readers(300, {"champion": 0.3, "challenger": 0.8}))

    def write(recorder: Recorder, part: int) -> None:
        with recorder.running():
            for event in events[part::3]:
                recorder.add(event)

    threads = [
        threading.Thread(target=write, args=(recorder, part)) for part, recorder in enumerate(recorders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [recorder.tally().written for recorder in recorders] == [300] * 3
    assert sum(recorder.tally().lost for recorder in recorders) == 0
    engine = connect(address, writes=False)
    assert revision(engine) == HEAD
    with engine.connect() as connection:
        counts = [
            connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in metadata.sorted_tables
        ]
    assert counts == [300, 300, 300]
    engine.dispose()
    assert look(address, "t").verdict == "better"


def test_a_retry_adds_nothing_and_a_zero_byte_is_no_error(address: str) -> None:
    engine = connect(address.replace("postgresql://", "postgres://"), writes=True)
    migrate(engine)
    event = dataclasses.replace(exposure("zero", test="zero"), prompt="A fox\0 came")
    store(engine, [event])
    store(engine, [event])
    with engine.connect() as connection:
        found = (
            connection.execute(sa.select(exposures.c.prompt).where(exposures.c.test == "zero"))
            .scalars()
            .all()
        )
    assert found == ["A fox\ufffd came"]
    engine.dispose()
