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
PLACES = (".", "model", "artifacts/model")
"""Where a version's files may hold the model folder."""


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
    """Download a registered version (`models:/NAME/3`, `models:/NAME@champion`) into `place`: its model folder.

    Raises:
        InputError: there is no such version, or it holds no model folder.
    """
    from training.mlflow_store import open_store, unusable

    open_store(tracking_uri)  # loads MLflow, quietly; raises where nothing answers
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        downloaded = download_artifacts(
            artifact_uri=version, dst_path=str(place), tracking_uri=tracking_uri, registry_uri=tracking_uri
        )
    except MlflowException as error:
        raise InputError("target", f"{version} is not a registered version ({error.message})") from None
    except OSError as error:
        raise unusable(tracking_uri, error) from error
    for inner in PLACES:
        folder = Path(downloaded) / inner
        if (folder / "digest").is_file() and (folder / "config.json").is_file():
            return folder.resolve()
    raise InputError("target", f"{version} holds no model folder")


def _headers(address: str, settings: Settings) -> dict[str, str]:
    """The proxy token, for the endpoint that it belongs to and for no other address."""
    own = settings.modal_endpoint_url
    if own is None or settings.modal_key is None or settings.modal_secret is None:
        return {}
    if address.rstrip("/") != own.rstrip("/") and not address.startswith(own.rstrip("/") + "/"):
        return {}
    return {"Modal-Key": settings.modal_key, "Modal-Secret": settings.modal_secret.get_secret_value()}
