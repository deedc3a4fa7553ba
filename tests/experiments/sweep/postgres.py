"""A PostgreSQL server of a test's own, on a port of 127.0.0.1 that was free a moment ago."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Address of an empty database, while this context is open. The server refuses to run as root, so it does not."""
    folder.mkdir(parents=True)
    user = None
    if os.getuid() == 0:
        user = "postgres"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        for above in folder.parents:
            if above != Path("/") and above.stat().st_uid == 0 and above.stat().st_mode & 0o077 == 0:
                above.chmod(above.stat().st_mode | 0o011)  # to pass through, not to look into
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"

    def call(*command: str) -> None:
        subprocess.run(command, check=True, user=user, capture_output=True, cwd=folder)

    call("initdb", "-D", str(data), "-U", "story", "--auth=trust", "--no-sync")
    options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
    call("pg_ctl", "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql://story@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
