"""From what a user names to a target: `local`, an address, a registered version, a model folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experiments.benchmark.targets.base import Target
from experiments.benchmark.targets.local import LocalTarget
from experiments.benchmark.targets.web import WebTarget
from model.errors import InputError
from model.settings import Settings

REGISTERED = "models:/"


@contextlib.contextmanager
def open_target(text: str, settings: Settings, *, option: str = "target") -> Iterator[Target]:
    """The target that `text` names; what had to be downloaded for it goes when this context ends.

    `local` is the model of the settings, in this process. Settings decide about slots, threads and precision of
    whatever runs in this process, and only their own endpoint is sent their token.

    Raises:
        InputError: `text` names nothing that can be asked. `ModelError`: the model is missing or damaged.
    """
    if text.startswith(("http://", "https://")):
        yield WebTarget(text, headers=_headers(text, settings))
        return
    with contextlib.ExitStack() as stack:
        chosen, name = settings.story_model, text
        if text != "local":
            chosen = text
        elif chosen is not None:
            name = f"local ({Path(chosen).name})"
        if chosen is not None and chosen.startswith(REGISTERED):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="story-version-")))
            chosen = str(registered_folder(chosen, settings.mlflow_tracking_uri, place))
        elif text != "local":
            if not Path(text).is_dir():
                allowed = (
                    "local, an http(s) address, models:/NAME/VERSION, models:/NAME@ALIAS or a model folder"
                )
                raise InputError(option, f"must be {allowed}, got {text!r}")
            name = f"local ({Path(text).resolve().name})"
        yield LocalTarget.load(settings.model_copy(update={"story_model": chosen}), name=name)


def registered_folder(version: str, tracking_uri: str, place: Path) -> Path:
    """Fetch a registered version (`models:/story-writer/3`, `models:/story-writer@champion`) into `place`.

    Returns its model folder. Raises `InputError` when there is no such version, or the store cannot be used.
    """
    from experiments.registry.versions import NAME, download, find

    name, _, wanted = version.removeprefix(REGISTERED).replace("@", "/").partition("/")
    if name != NAME:
        raise InputError("target", f"must name a version of {NAME}, got {version!r}")
    return download(tracking_uri, find(tracking_uri, wanted), place).path


def _headers(address: str, settings: Settings) -> dict[str, str]:
    """The proxy token, for the endpoint that it belongs to and for no other address."""
    own = settings.modal_endpoint_url
    if own is None or settings.modal_key is None or settings.modal_secret is None:
        return {}
    if address.rstrip("/") != own.rstrip("/") and not address.startswith(own.rstrip("/") + "/"):
        return {}
    return {"Modal-Key": settings.modal_key, "Modal-Secret": settings.modal_secret.get_secret_value()}
