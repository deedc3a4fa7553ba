"""The backends by name.

`local` is the engine in this process, `modal` the service at `MODAL_ENDPOINT_URL`, and `auto` both together: Modal
first where `USE_MODAL` is on, and the engine here whenever Modal fails.
"""

from functools import partial
from typing import TYPE_CHECKING

from model.errors import InputError
from model.serving.backend import Backend, ModelInfo
from model.serving.deployments import Deployment, open_deployments
from model.serving.following import EmbeddedBackend as EmbeddedBackend
from model.serving.following import open_local
from model.serving.registry import OpenRegistry, open_server
from model.settings import Settings

if TYPE_CHECKING:
    from model.serving.remote.modal import ModalBackend

BACKENDS = ("auto", "local", "modal")


def open_backend(kind: str, settings: Settings, open_registry: OpenRegistry = open_server) -> Backend:
    """Open the backend called `kind`; `open_registry` opens the registry of an embedded engine's model.

    Raises `InputError` for another name, and without Modal's address.
    """
    if kind not in BACKENDS:
        raise InputError("backend", f"must be one of {', '.join(BACKENDS)}, got {kind!r}")
    if kind == "modal":
        return _modal(settings)
    local = open_local(settings, open_registry)
    if kind == "local" or not settings.use_modal:
        return local
    from model.serving.remote.modal import FailoverBackend  # as in `_modal`

    return FailoverBackend(_modal(settings, model=local.model, fail_fast=True), local)


def open_deployment(deployment: Deployment, settings: Settings) -> "ModalBackend":
    """Open one deployment on Modal, active or not. Raises `InputError` when nothing proven runs there."""
    record = open_deployments(settings).read()
    url = None if record is None else record.urls[deployment]
    if record is None or url is None:
        raise InputError("STORY_SPLIT", f"names the variant {deployment!r}, and nothing proven runs there")
    model = ModelInfo(f"the model on {deployment}", record.versions[deployment] or "unknown")
    return _modal(settings, url, model=model)


def _modal(
    settings: Settings, url: str | None = None, *, model: ModelInfo | None = None, fail_fast: bool = False
) -> "ModalBackend":
    """Open the service at `url`, by default at the active deployment's address; `model` is asked for where unknown."""
    # What only talks to Modal is loaded where it is used.
    from model.serving.remote.client import ServiceClient, fetch_model_info, proxy_auth
    from model.serving.remote.modal import Breaker, ModalBackend

    default = settings.modal_endpoint_url
    if default is None:
        raise InputError("MODAL_ENDPOINT_URL", "must be set to use Modal")
    deployments = open_deployments(settings)

    def endpoint() -> str:
        return url or deployments.endpoint(default) or default

    headers = proxy_auth(settings)
    found = model or fetch_model_info(endpoint(), headers)
    return ModalBackend(
        endpoint,
        partial(ServiceClient, headers, settings, fail_fast=fail_fast),
        # One that does not answer yet is no reason not to open.
        model=ModelInfo("the model on Modal", "unknown") if isinstance(found, str) else found,
        breaker=Breaker(settings.story_breaker_failures, settings.story_breaker_reset),
    )
