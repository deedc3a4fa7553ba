"""Two deployments as two processes of this machine, for a single server and for trying a switch out.

Each is a `python -m model.serving.http` on a free port of 127.0.0.1 that outlives the command which started it. What
is kept lies in one folder: uploaded models by digest, and for each deployment its log and a note of its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from model.architecture.folder import ModelFolder
from model.errors import DeployError, ModelError
from model.serving.deployments import Deployment
from model.settings import environment_names

START_WITHIN = 60.0
"""Seconds in which a process has to listen; loading takes one or two on a machine with nothing else to do."""
CLOSING = 10.0
"""Seconds beyond the drain after which a process that was told to end is ended by force."""
LISTENS = re.compile(r"^Story service.*?: (http://\S+)$", flags=re.MULTILINE)


class LoopbackPlatform:
    """Processes of this machine; their state lies in `folder`."""

    name = "loopback"

    def __init__(self, folder: Path, *, drain: float) -> None:
        """`drain`: seconds that running stories get when a process is told to end."""
        self.folder = folder
        self._drain = drain

    def upload(self, folder: ModelFolder) -> bool:
        """Copy the folder; a copy that was cut off half way is not taken for one."""
        place = self.folder / "models" / folder.digest
        if place.is_dir():
            return False
        fresh = place.with_name(f".{folder.digest}.{os.getpid()}")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            shutil.copytree(folder.path, fresh)
            fresh.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return True

    def start(self, deployment: Deployment, digest: str) -> str:
        """Replace the deployment's process; see `Platform.start`."""
        model = self.folder / "models" / digest
        if not model.is_dir():
            raise ModelError(f"{digest[:12]} was not uploaded: run `story deploy upload --platform loopback`")
        self.stop(deployment)
        log = self.folder / f"{deployment}.log"
        order = [sys.executable, "-m", "model.serving.http", "--host", "127.0.0.1", "--port", "0"]
        # Not by `subprocess`, whose objects want to be waited for: this process outlives the command on purpose.
        # A session of its own, because Ctrl-C in this terminal is not meant for it.
        # Limits hold where readers come in: here, the demo before this copy would be the one client.
        unlimited = {name: "off" for name in environment_names() if name.startswith("STORY_LIMIT_")}
        pid = os.posix_spawn(
            sys.executable,
            [*order, "--model", str(model), "--name", deployment],
            {**os.environ, **unlimited},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        try:
            url = self._wait_for_address(pid, log)
        except BaseException:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise
        note = {"pid": pid, "url": url, "version": digest}
        self._note(deployment).write_text(json.dumps(note) + "\n", "utf-8")
        return url

    def stop(self, deployment: Deployment) -> bool:
        """SIGTERM, on which the service lets its stories end; see `Platform.stop`."""
        pid = self._pid(deployment)
        if pid is None:
            return False
        deadline = time.monotonic() + self._drain + CLOSING
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            while self._runs(pid, deployment):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            _ended(pid)
        self._note(deployment).unlink(missing_ok=True)
        return True

    def _wait_for_address(self, pid: int, log: Path) -> str:
        deadline = time.monotonic() + START_WITHIN
        while True:
            ended = _ended(pid)
            text = log.read_text("utf-8", errors="replace") if log.exists() else ""
            if not ended and (found := LISTENS.search(text)):
                return found[1]
            if ended:
                last = (text.strip().splitlines() or ["it said nothing"])[-1]
                raise DeployError(f"the service did not start: {last}")
            if time.monotonic() > deadline:
                raise DeployError(f"the service did not listen within {START_WITHIN:.0f} s; see {log}")
            time.sleep(0.05)

    def _note(self, deployment: Deployment) -> Path:
        return self.folder / f"{deployment}.json"

    def _pid(self, deployment: Deployment) -> int | None:
        """The deployment's process, if it still runs."""
        try:
            pid = int(json.loads(self._note(deployment).read_text("utf-8"))["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if self._runs(pid, deployment) else None

    @staticmethod
    def _runs(pid: int, deployment: Deployment) -> bool:
        """Whether `pid` is the deployment's service: after a restart of the machine it may be anything."""
        if Path("/proc/self/cmdline").exists():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                return False
        else:
            listed = subprocess.run(
                ["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False
            )
            words = listed.stdout.split()
        return "model.serving.http" in words and deployment in words


def _ended(pid: int) -> bool:
    """Whether `pid`, a child of this process, has ended; if so, nothing is left of it. No child: False."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False
