"""Bring a version onto the idle deployment, and traffic from one deployment to the other.

A deployment counts as ready, and can be switched to, only while the state holds an address for it. `release` removes
that address before it replaces the deployment and sets it when the new version has passed its check, so a deployment
that failed half way never receives a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deploy.release import smoke
from deploy.release.platforms import Platform
from deploy.release.smoke import SmokeReport
from model.architecture.folder import ModelFolder
from model.errors import DeployError, InputError
from model.serving.deployments import DEPLOYMENTS, Deployment, DeploymentState, DeploymentStore
from model.settings import Settings

STATUS_TIMEOUT = 5.0
"""Seconds in which a deployment has to answer `story deploy status`; one that is scaled to zero does not."""


class UndecidedError(DeployError):
    """The check could not decide whether a deployment works."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Release:
    """A version that was deployed and passed its check."""

    deployment: Deployment
    url: str
    version: str
    uploaded: bool
    cold_start_s: float
    """Seconds from its address being known to its being ready."""
    smoke: SmokeReport


def choose_deployment(state: DeploymentState | None, wanted: Deployment | None) -> Deployment:
    """Return where a new version goes: the idle deployment. Raises `InputError` when the active one is wanted."""
    if state is None or state.url is None:
        return wanted or "blue"
    if wanted == state.active:
        raise InputError(
            "deployment",
            f"must be {state.idle}, the idle one: {wanted} is active, and users would notice its replacement",
        )
    return state.idle


def release(
    folder: ModelFolder,
    platform: Platform,
    store: DeploymentStore,
    settings: Settings,
    *,
    deployment: Deployment | None,
    timeout: float,
    progress: Callable[[str], None],
) -> Release:
    """Upload, start on the idle deployment, wait until it is ready, check it, and only then record it as ready.

    Raises `DeployError` when it does not come up or fails its check, `UndecidedError` when the check cannot decide.
    """
    state = store.load()
    chosen = choose_deployment(state, deployment)
    uploaded = platform.upload(folder)
    progress(f"{folder.digest[:12]} {'uploaded' if uploaded else 'was uploaded already'}")
    if state is not None and state.urls[chosen] is not None:
        store.set_deployment(chosen, None, None)
    progress(f"starting {chosen} on {platform.name}")
    url = platform.start(chosen, folder.digest)
    progress(f"waiting for {url}")
    took = smoke.wait_until_ready(url, settings, version=folder.digest, timeout=timeout)
    report = smoke.check(url, settings)
    if report.verdict == "failed":
        raise DeployError(f"{chosen} did not pass its check: {report.reason}")
    if report.verdict == "undecided":
        raise UndecidedError(f"{chosen} could not be checked: {report.reason}")
    progress(f"{chosen} passed: {report.reason}")
    store.set_deployment(chosen, url, folder.digest)
    return Release(chosen, url, folder.digest, uploaded, took, report)


def switch(store: DeploymentStore, settings: Settings, to: Deployment | None, *, timeout: float) -> DeploymentState:
    """Send new requests to the idle deployment (or `to`) once it is ready; a timeout of 0 does not ask it."""
    state = store.load()
    if state is not None and timeout > 0:
        target = to or state.idle
        url = state.urls[target]
        if url is not None:
            smoke.wait_until_ready(url, settings, version=state.versions[target], timeout=timeout)
    return store.switch(to)


def address_of(store: DeploymentStore, deployment: Deployment | None) -> tuple[Deployment, str]:
    """Return (name, address) of a deployment, None for the active one. Raises `DeployError` where there is none."""
    state = store.load()
    if state is None:
        raise DeployError("nothing is deployed yet: run `story deploy deploy`")
    chosen = deployment or state.active
    url = state.urls[chosen]
    if url is None:
        raise DeployError(f"{chosen} has no deployment that passed its check: run `story deploy deploy`")
    return chosen, url


def stop(
    platform: Platform, store: DeploymentStore, deployment: Deployment | None, *, force: bool
) -> tuple[Deployment, bool]:
    """End a deployment, None for the idle one; the active one only if forced. Return (its name, whether it ran)."""
    state = store.load()
    if state is None and deployment is None:
        raise DeployError("nothing is deployed yet")
    chosen = deployment or (state.idle if state is not None else "blue")
    if state is not None and state.urls[chosen] is not None:
        if chosen == state.active and not force:
            raise InputError("deployment", f"{chosen} is active; --force ends it all the same")
        store.set_deployment(chosen, None, None)
    return chosen, platform.stop(chosen)


def status(store: DeploymentStore, settings: Settings) -> dict[str, Any]:
    """Return the state and each deployment's own health; asking may wake one that is scaled to zero."""
    state = store.load()
    result: dict[str, Any] = {"store": store.where, "active": state and state.active, "deployments": {}}
    if state is None:
        return result
    result |= {"previous": state.previous, "changed": state.changed, "generation": state.generation}
    for name in DEPLOYMENTS:
        url = state.urls[name]
        entry: dict[str, Any] = {"url": url, "version": state.versions[name], "health": "not deployed"}
        if url is not None:
            code, body = smoke.ask_health(url, settings, STATUS_TIMEOUT)
            entry |= {"health": body.get("status", f"HTTP {code}"), "ready": code == 200}
            entry |= {key: body[key] for key in ("open", "capacity", "detail") if key in body}
        result["deployments"][name] = entry
    return result
