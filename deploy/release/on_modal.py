"""The two deployments on Modal: one App each, made by `modal deploy` from `deploy.modal_app`.

What the public client offers is used as it is: a Volume for the models, the `modal` command for deploying and
stopping (it builds images and shows its progress), a lookup for the address.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.modal_client import modal_errors
from model.architecture.folder import ModelFolder
from model.errors import DeployError, MissingExtraError, ModelError
from model.serving.deployments import Deployment

if TYPE_CHECKING:
    import modal

    from model.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = "deploy.modal_app"
MODELS = "write-me-a-story-models"
SERVER = "Story"
"""Names that `deploy.modal_app` takes from here: importing that file decides which deployment it defines."""


def app_name(deployment: Deployment) -> str:
    """The App that is `deployment`."""
    return f"write-me-a-story-{deployment}"


class ModalPlatform:
    """Modal, with the account that the client's configuration names."""

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
        with modal_errors():
            return cls(modal.Client.from_env(), settings)

    def upload(self, folder: ModelFolder) -> bool:
        """Into the Volume, under the digest. One batch: its files appear together or not at all."""
        import modal

        names = {path.name for path in folder.path.iterdir() if path.is_file()}
        with modal_errors():
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
        """`modal deploy`. Containers of the version before end their stories within the grace period."""
        import modal

        if not (ROOT / "constraints.txt").is_file():
            raise ModelError(f"deploying needs a checkout of the project: {ROOT} has no constraints.txt")
        self._modal(
            ["deploy", "-m", DEFINITIONS, "--tag", digest[:12]],
            {"STORY_DEPLOYMENT": deployment, "STORY_REVISION": digest, "STORY_GPU": self._settings.story_gpu},
        )
        with modal_errors():
            url = modal.Server.from_name(app_name(deployment), SERVER, client=self._client).get_url()
        if not url:
            raise DeployError(f"Modal tells no address for {app_name(deployment)}")
        return url.rstrip("/")

    def stop(self, deployment: Deployment) -> bool:
        """`modal app stop`, after which nothing of the deployment is left but its logs."""
        import modal

        with modal_errors():
            try:
                modal.Server.from_name(app_name(deployment), SERVER, client=self._client).hydrate()
            except modal.exception.NotFoundError:
                return False
        self._modal(["app", "stop", app_name(deployment), "--yes"], {})
        return True

    @staticmethod
    def _modal(arguments: list[str], environment: dict[str, str]) -> None:
        """Run the `modal` command; its progress goes to stderr, which leaves stdout to `--json`."""
        order = [sys.executable, "-m", "modal", *arguments]
        run = subprocess.run(
            order, cwd=ROOT, env={**os.environ, **environment}, stdout=sys.stderr.fileno(), check=False
        )
        if run.returncode:
            raise DeployError(f"`modal {arguments[0]}` failed with exit code {run.returncode}; see above")
