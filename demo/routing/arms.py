"""The arms that `STORY_SPLIT` names, loaded: what the demo writes with, and what it remembers of that.

An arm is a registered version (number, alias or digest), a model folder, a deployment on Modal, or `default`, which is
what would write without a test. Registered versions are looked up once, at the start: only then is MLflow imported, and
an alias that moves later is seen at the next start.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from demo.routing.split import Arm, SplitBackend
from experiments.ab.assignment import DEFAULT_VARIANT, SETTING, parse_split, without_test
from experiments.ab.recorder import Recorder, database_url
from model.errors import InputError, MissingExtraError
from model.serving.backend import Backend, LocalBackend

if TYPE_CHECKING:
    from model.settings import Settings

DEPLOYMENTS = ("blue", "green")


def divided(
    usual: Callable[[], Backend],
    settings: Settings,
    *,
    over: Callable[[Backend], Backend] = lambda backend: backend,
) -> Backend:
    """What the demo writes with: `usual()`, split between versions and noted as the settings say.

    `over` puts what stands before each backend there, a memory of told stories: stories told from it are noted too.

    Raises `InputError` for a split that cannot be made, `MissingExtraError` where an arm needs packages that are not
    installed, `ModelError` for a folder that cannot be used.
    """
    if not settings.story_feedback:
        if settings.story_split is not None:
            raise InputError(
                SETTING, "needs STORY_FEEDBACK: a test without its readers' verdicts shows nothing"
            )
        return over(usual())
    name = settings.story_split_name
    split = without_test(name) if settings.story_split is None else parse_split(settings.story_split, name)
    salt = settings.story_salt
    recorder = Recorder(
        database_url(settings),
        salt="" if salt is None else salt.get_secret_value(),
        keeps_prompts=settings.story_keep_prompts,
    )
    # An arm without a share gets no reader, and so needs no memory either.
    loaded = [_load(variant.name, usual, settings) for variant in split.variants if variant.weight]
    arms = [replace(arm, backend=over(arm.backend)) for arm in loaded]
    return SplitBackend(split, arms, recorder)


def _load(arm: str, usual: Callable[[], Backend], settings: Settings) -> Arm:
    if arm == DEFAULT_VARIANT:
        return Arm(arm, usual())
    if arm in DEPLOYMENTS and settings.modal_endpoint_url is not None:
        from model.serving.remote import open_deployment  # which imports what talks to Modal

        return Arm(arm, open_deployment(arm, settings))
    if "/" in arm or Path(arm).is_dir():
        return Arm(arm, _local(Path(arm).expanduser(), settings))
    return _registered(arm, settings)


def _local(folder: Path, settings: Settings) -> LocalBackend:
    return LocalBackend.load(settings.model_copy(update={"story_model": str(folder)}))


def _registered(arm: str, settings: Settings) -> Arm:
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError(f"the arm {arm!r} of {SETTING}, a registered version,", "train")
    from experiments.registry.versions import NAME, download, find

    uri = settings.mlflow_tracking_uri
    try:
        version = find(uri, arm)
    except InputError as error:
        raise InputError(SETTING, f"names the arm {arm!r}, and the {error}") from None
    with tempfile.TemporaryDirectory(prefix="story-arm-") as scratch:
        backend = _local(download(uri, version, Path(scratch)).path, settings)
    backend.model = replace(backend.model, name=f"{NAME} {version.number}")
    return Arm(arm, backend, str(version.number))
