"""Whether a deployment is ready for requests, and the switch to one that is."""

import time
from typing import Any

import httpx

from model.errors import AccountError, DeployError
from model.serving.deployments import Deployment, DeploymentState, DeploymentStore
from model.serving.remote.client import proxy_auth
from model.settings import Settings

READY_TIMEOUT = 300.0
"""Seconds that a deployment may take to become ready: a first start builds a container and a snapshot."""
POLL_INTERVAL = 1.0
"""Seconds between two health requests to a deployment that starts."""


def ask_health(url: str, settings: Settings, timeout: float) -> tuple[int, dict[str, Any]]:
    """Status and body of the health route; status 0 and a `detail` where nothing answers in time."""
    try:
        answer = httpx.get(f"{url}/api/health", headers=proxy_auth(settings), timeout=timeout)
    except httpx.HTTPError as error:
        return 0, {"status": "unreachable", "detail": str(error) or type(error).__name__}
    try:
        body = answer.json()
    except ValueError:
        body = None
    return answer.status_code, body if isinstance(body, dict) else {"status": f"HTTP {answer.status_code}"}


def wait_until_ready(url: str, settings: Settings, *, version: str | None, timeout: float = READY_TIMEOUT) -> float:
    """Wait until `url` is healthy and serves `version`, if one is given; return the seconds it took.

    Raises:
        AccountError: it requires a proxy token, or refuses the one it got.
        DeployError: it is not ready within `timeout`, or serves another version all that time.
    """
    began = time.monotonic()
    while True:
        status, body = ask_health(url, settings, timeout=max(1.0, min(30.0, timeout)))
        if status in (401, 403):
            raise AccountError(f"{url} asks for a proxy token: set MODAL_KEY and MODAL_SECRET to the two halves of one")
        model = body.get("model")
        serves = model.get("version") if isinstance(model, dict) else None
        if status == 200 and (version is None or serves == version):
            return time.monotonic() - began
        waited = time.monotonic() - began
        if waited > timeout:
            reason = body.get("detail") or body.get("status") or f"HTTP {status}"
            if status == 200:
                reason = f"it serves {str(serves)[:12]}, not {str(version)[:12]}"
            raise DeployError(f"{url} was not ready after {waited:.0f} s: {reason}")
        time.sleep(min(POLL_INTERVAL, max(timeout / 10, 0.05)))


def switch(
    store: DeploymentStore, settings: Settings, to: Deployment | None, *, timeout: float, generation: int | None = None
) -> DeploymentState:
    """Send new requests to the idle deployment (or `to`) once it is ready; a timeout of 0 does not ask it.

    `generation`: see `DeploymentStore.switch`. Raises what `wait_until_ready` and that raise.
    """
    state = store.load()
    if state is not None and timeout > 0:
        target = to or state.idle
        url = state.urls[target]
        if url is not None:
            wait_until_ready(url, settings, version=state.versions[target], timeout=timeout)
    return store.switch(to, generation=generation)
