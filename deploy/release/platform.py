"""What is asked of a place where the two deployments run, whatever it is: Modal, or this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from model.architecture.folder import ModelFolder
from model.errors import InputError
from model.serving.deployments import Deployment

if TYPE_CHECKING:
    from model.settings import Settings

PLATFORMS = ("modal", "loopback")


class Platform(Protocol):
    """Keeps model folders by digest and runs the two deployments."""

    name: str

    def upload(self, folder: ModelFolder) -> bool:
        """Keep a copy of `folder` under its digest; False: it was there already."""
        ...

    def start(self, deployment: Deployment, digest: str) -> str:
        """Make `deployment` serve the uploaded model `digest`, replacing what it served; returns its address.

        Stories that `deployment` is writing end first. Raises `DeployError` when it does not come up.
        """
        ...

    def stop(self, deployment: Deployment) -> bool:
        """End the deployment, running stories first; False: there was none."""
        ...


def open_platform(name: str, settings: Settings) -> Platform:
    """`modal` or `loopback`. Raises `InputError`, `AccountError`, `MissingExtraError`."""
    if name == "modal":
        from deploy.release.on_modal import ModalPlatform

        return ModalPlatform.open(settings)
    if name == "loopback":
        from deploy.release.loopback import LoopbackPlatform
        from model.serving.deployments import state_folder

        return LoopbackPlatform(state_folder() / "loopback", drain=settings.story_drain)
    raise InputError("platform", f"must be one of {', '.join(PLATFORMS)}, got {name!r}")
