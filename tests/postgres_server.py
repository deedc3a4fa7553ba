"""A real PostgreSQL of a test's own, on a free port of the loopback, that may be killed and brought back."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from model.serving.http.server import free_port


@dataclass
class PostgresServer:
    """One whose data lie in `place`; it runs, or ran."""

    programs: Path
    place: Path
    port: int
    user: dict[str, Any] = field(default_factory=dict)
    """Whom it runs as: PostgreSQL refuses to be root."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://story:hunter2@127.0.0.1:{self.port}/postgres"

    def make(self) -> None:
        """An empty database."""
        order = [str(self.programs / "initdb"), "-D", str(self.place / "data"), "-U", "story"]
        order += ["-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(order, check=True, capture_output=True, cwd=self.place, **self.user)

    def start(self) -> None:
        order = [str(self.programs / "postgres"), "-D", str(self.place / "data"), "-p", str(self.port)]
        order += ["-h", "127.0.0.1", "-k", str(self.place), "-F"]
        self.process = subprocess.Popen(
            order, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.place, **self.user
        )
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None, "PostgreSQL ended at once"
            threading.Event().wait(0.05)
        raise AssertionError("PostgreSQL did not start")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT without waiting for clients, as SIGTERM would; SIGQUIT at once, as a crash does."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """An empty server that runs on entry; a skip that says why where PostgreSQL is not installed."""
    found = shutil.which("postgres")
    below = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    programs = Path(found).resolve().parent if found else next(iter(below), None)
    if programs is None:
        pytest.skip("PostgreSQL is not installed on this machine (Debian package: postgresql)")
    port = free_port()
    server = PostgresServer(programs, Path(tempfile.mkdtemp(prefix="story-postgres-")), port)
    if os.geteuid() == 0:
        account = pwd.getpwnam("postgres")
        server.user = {"user": account.pw_uid, "group": account.pw_gid}
        os.chown(server.place, account.pw_uid, account.pw_gid)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.place, ignore_errors=True)
