"""The backends that the page can write with, by name.

`local` is the engine in this process, `modal` the service at `MODAL_ENDPOINT_URL`, and `auto` the two together:
Modal first where `USE_MODAL` is on, and the engine here whenever Modal does not do its part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.errors import InputError
from model.serving.backend import Backend, LocalBackend, ModelInfo

if TYPE_CHECKING:
    from model.serving.remote.remote import ModalBackend
    from model.settings import Settings

BACKENDS = ("auto", "local", "modal")


def open_backend(kind: str, settings: Settings) -> Backend:
    """The backend called `kind`. Raises `InputError` for another name, and where Modal's address is missing."""
    if kind not in BACKENDS:
        raise InputError("backend", f"must be one of {', '.join(BACKENDS)}, got {kind!r}")
    if kind == "modal":
        return _modal(settings)
    local = LocalBackend.load(settings)
    if kind == "local" or not settings.use_modal:
        return local
    from model.serving.remote.auto import AutoBackend  # as below

    return AutoBackend(_modal(settings, beside=local), local)


def open_deployment(deployment: str, settings: Settings) -> ModalBackend:
    """One deployment on Modal, whichever is active. Raises `InputError` when nothing proven runs there."""
    from model.serving.deployments import deployment_named, open_deployments

    named = deployment_named(deployment)
    record = open_deployments(settings).read()
    url = None if record is None else record.urls[named]
    if record is None or url is None:
        raise InputError("STORY_SPLIT", f"names the arm {deployment!r}, and nothing proven runs there")
    model = ModelInfo(f"the model on {deployment}", record.versions[named] or "unknown")
    return _modal(settings, only=(url, model))


def _modal(
    settings: Settings, *, beside: LocalBackend | None = None, only: tuple[str, ModelInfo] | None = None
) -> ModalBackend:
    """The service on Modal; `beside` is the writer that steps in for it, if there is one.

    `only`: one deployment's address and model, instead of the active one's.
    """
    from model.serving.deployments import open_deployments
    from model.serving.remote.breaker import Breaker
    from model.serving.remote.exchange import TimeOuts, introduce, proxy_auth
    from model.serving.remote.remote import (
        ModalBackend,  # what only talks to Modal is loaded where it is used
    )

    default = settings.modal_endpoint_url
    if default is None:
        raise InputError("MODAL_ENDPOINT_URL", "must be set to write with Modal")
    deployments = open_deployments(settings)

    def endpoint() -> str:
        return (deployments.endpoint(default) or default) if only is None else only[0]

    headers = proxy_auth(settings)
    known = only[1] if only is not None else beside.model if beside is not None else None
    model = introduce(endpoint(), headers) if known is None else known
    if isinstance(model, str):  # it does not answer yet, which is no reason not to open
        model = ModelInfo("the model on Modal", "unknown")
    return ModalBackend(
        endpoint,
        model=model,
        times=TimeOuts.of(settings),
        breaker=Breaker(settings.story_breaker_failures, settings.story_breaker_reset),
        headers=headers,
        fail_fast=beside is not None,
    )
