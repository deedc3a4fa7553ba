"""Where the two deployments run: on Modal, or as processes of this machine.

`open_platform` opens one by name. Everything above it (`release`, `cli`) knows the protocol `Platform` only.
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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from model.architecture.folder import ModelFolder
from model.errors import DeployError, InputError, MissingExtraError, ModelError
from model.serving import http as service
from model.serving.deployments import Deployment, state_folder
from model.settings import Settings, environment_names

if TYPE_CHECKING:
    import modal

PLATFORMS = ("modal", "loopback")


class Platform(Protocol):
    """Keeps model folders by digest and runs the two deployments."""

    name: str

    def upload(self, folder: ModelFolder) -> bool:
        """Keep a copy of `folder` under its digest; False: it was there already."""

    def start(self, deployment: Deployment, digest: str) -> str:
        """Make `deployment` serve the uploaded model `digest`, replacing what it served; return its address.

        Running requests of the replaced version finish first. Raises `DeployError` when it does not come up.
        """

    def stop(self, deployment: Deployment) -> bool:
        """End the deployment after its running requests; False: there was none."""


def open_platform(name: str, settings: Settings) -> Platform:
    """Open `modal` or `loopback`. Raises `InputError`, `AccountError`, `MissingExtraError`."""
    if name == "modal":
        return ModalPlatform.open(settings)
    if name == "loopback":
        return LoopbackPlatform(state_folder() / "loopback", drain=settings.story_drain)
    raise InputError("platform", f"must be one of {', '.join(PLATFORMS)}, got {name!r}")


# Modal

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = "deploy.modal_app"
"""Run by `modal deploy`, never imported here: importing that module decides which deployment it defines."""
MODELS = "write-me-a-story-models"
"""Volume of uploaded model folders."""
SERVER = "Story"


def app_name(deployment: Deployment) -> str:
    """The name of the Modal App that is `deployment`."""
    return f"write-me-a-story-{deployment}"


def _modal_errors() -> AbstractContextManager[None]:
    # Imported here: a serving container imports this module for the names above, and has no `experiments`.
    from experiments.common.modal_client import modal_errors

    return modal_errors()


class ModalPlatform:
    """One Modal App for each deployment, in the account that the client's configuration names.

    It uses Modal's public client as it is: a Volume for the models, the `modal` command for deploying and stopping
    (it builds images and shows its progress), a lookup for the address.
    """

    name = "modal"

    def __init__(self, client: modal.Client, settings: Settings) -> None:
        self._client = client
        self._settings = settings

    @classmethod
    def open(cls, settings: Settings) -> ModalPlatform:
        """Connect. Raises `MissingExtraError` without the package, `AccountError` without an account."""
        try:
            import modal
        except ModuleNotFoundError:
            raise MissingExtraError("story deploy --platform modal", "modal") from None
        with _modal_errors():
            return cls(modal.Client.from_env(), settings)

    def upload(self, folder: ModelFolder) -> bool:
        """Put the folder into the Volume in one batch: its files appear together or not at all."""
        import modal

        names = {path.name for path in folder.path.iterdir() if path.is_file()}
        with _modal_errors():
            volume = modal.Volume.from_name(MODELS, create_if_missing=True, client=self._client)
            try:
                there = {Path(entry.path).name for entry in volume.listdir(f"/{folder.digest}")}
            except modal.exception.NotFoundError:
                there = set()
            if names <= there:
                return False
            with volume.batch_upload(force=True) as batch:
                for name in sorted(names):
                    batch.put_file(folder.path / name, f"/{folder.digest}/{name}")
        return True

    def start(self, deployment: Deployment, digest: str) -> str:
        """Run `modal deploy`. Containers of the replaced version drain within the grace period."""
        import modal

        if not (ROOT / "constraints.txt").is_file():
            raise ModelError(f"deploying needs a checkout of the project: {ROOT} has no constraints.txt")
        self._modal(
            ["deploy", "-m", DEFINITIONS, "--tag", digest[:12]],
            {"STORY_DEPLOYMENT": deployment, "STORY_REVISION": digest, "STORY_GPU": self._settings.story_gpu},
        )
        with _modal_errors():
            url = modal.Server.from_name(app_name(deployment), SERVER, client=self._client).get_url()
        if not url:
            raise DeployError(f"Modal gives no address for {app_name(deployment)}")
        return url.rstrip("/")

    def stop(self, deployment: Deployment) -> bool:
        """Run `modal app stop`, which leaves nothing of the deployment but its logs."""
        import modal

        with _modal_errors():
            try:
                modal.Server.from_name(app_name(deployment), SERVER, client=self._client).hydrate()
            except modal.exception.NotFoundError:
                return False
        self._modal(["app", "stop", app_name(deployment), "--yes"], {})
        return True

    @staticmethod
    def _modal(arguments: list[str], environment: dict[str, str]) -> None:
        """Run the `modal` command; its progress goes to stderr, which leaves stdout to `--json`."""
        command = [sys.executable, "-m", "modal", *arguments]
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=sys.stderr.fileno(), check=False
        )
        if run.returncode:
            raise DeployError(f"`modal {arguments[0]}` failed with exit code {run.returncode}; see above")


# Loopback

START_TIMEOUT = 60.0
"""Seconds in which a process has to listen; loading takes one or two on an idle machine."""
STOP_TIMEOUT = 10.0
"""Seconds beyond the drain after which a process that was asked to end is killed."""
LISTENS = re.compile(r"^Story service.*?: (http://\S+)$", flags=re.MULTILINE)


class LoopbackPlatform:
    """Processes of this machine, for a single server and for trying out a switch.

    Each is the HTTP service on a free port of 127.0.0.1 that outlives the command which started it. `folder` holds
    the uploaded models by digest, and each deployment's log and record of its process.
    """

    name = "loopback"

    def __init__(self, folder: Path, *, drain: float) -> None:
        """`drain`: seconds that running requests get when a process is asked to end."""
        self.folder = folder
        self._drain = drain

    def upload(self, folder: ModelFolder) -> bool:
        """Copy the folder; an interrupted copy leaves nothing that looks like one."""
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
        folder = self.folder / "models" / digest
        if not folder.is_dir():
            raise ModelError(f"{digest[:12]} was not uploaded: run `story deploy upload --platform loopback`")
        self.stop(deployment)
        log = self.folder / f"{deployment}.log"
        command = [sys.executable, "-m", service.__name__, "--host", "127.0.0.1", "--port", "0"]
        command += ["--model", str(folder), "--name", deployment]
        # The demo in front of this copy applies the limits; here it would be the only client.
        unlimited = {name: "off" for name in environment_names() if name.startswith("STORY_LIMIT_")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **unlimited},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in this terminal does not reach it
            )
        try:
            url = self._wait_for_address(process, log)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = 0  # it outlives this command on purpose: no one waits for it
        record = {"pid": process.pid, "url": url, "version": digest}
        self._record(deployment).write_text(json.dumps(record) + "\n", "utf-8")
        return url

    def stop(self, deployment: Deployment) -> bool:
        """Send SIGTERM, on which the service drains; see `Platform.stop`."""
        pid = self.pid(deployment)
        if pid is None:
            return False
        deadline = time.monotonic() + self._drain + STOP_TIMEOUT
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            while _serves(pid, deployment):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # where this process started it
        self._record(deployment).unlink(missing_ok=True)
        return True

    def pid(self, deployment: Deployment) -> int | None:
        """The deployment's process, if it still runs."""
        try:
            pid = int(json.loads(self._record(deployment).read_text("utf-8"))["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if _serves(pid, deployment) else None

    def _record(self, deployment: Deployment) -> Path:
        return self.folder / f"{deployment}.json"

    @staticmethod
    def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            ended = process.poll() is not None
            text = log.read_text("utf-8", errors="replace")
            if ended:
                last = (text.strip().splitlines() or ["its log is empty"])[-1]
                raise DeployError(f"the service did not start: {last}")
            if found := LISTENS.search(text):
                return found[1]
            if time.monotonic() > deadline:
                raise DeployError(f"the service did not listen within {START_TIMEOUT:.0f} s; see {log}")
            time.sleep(0.05)


def _serves(pid: int, deployment: Deployment) -> bool:
    """Whether `pid` is the deployment's service: after a restart of the machine it may be any process."""
    if Path("/proc/self/cmdline").exists():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return False
    else:
        listed = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
        words = listed.stdout.split()
    return service.__name__ in words and deployment in words
