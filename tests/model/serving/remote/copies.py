"""Real processes of the service, to be killed: as a thread of a test, a server cannot die in mid-story."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

COPY = """
import sys
from model.serving.http.address import bound
from model.serving.http.app import create_service
from model.serving.http.server import DrainingServer
from tests.model.serving.http.serving import paced

service = create_service(paced(step_seconds=0.02)[0])
listener = bound("127.0.0.1", int(sys.stdin.readline()))
tell = lambda: print(listener.getsockname()[1], flush=True)
DrainingServer(service, drain=1, ready=tell).run(sockets=[listener])
"""


class Copies:
    """Processes of the service, one after the other on one port. All start at once, and wait for their turn."""

    def __init__(self, repository: Path, count: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        command = [sys.executable, "-c", COPY]
        self.port = 0
        self.waiting = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            for _ in range(count)
        ]
        self.running: list[subprocess.Popen[str]] = []

    def start(self) -> str:
        """Let the next one listen; it does when this returns."""
        process = self.waiting.pop()
        self.running.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{self.port}\n")
        process.stdin.flush()
        self.port = int(process.stdout.readline())
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End the last one as a power cut would."""
        self.running[-1].send_signal(signal.SIGKILL)
        self.running[-1].wait()

    def close(self) -> None:
        for process in [*self.waiting, *self.running]:
            process.kill()
            process.communicate()
