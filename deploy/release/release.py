"""What the verbs of `story deploy` do: a version's way onto a deployment, and the traffic's way between deployments.

A deployment counts as ready, and can be switched to, only while the record holds an address for it. That address is
taken out before the deployment is replaced and put back when the new version has passed its check, so a deployment that
failed half way can never receive a story.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.release import smoke
from deploy.release.platform import Platform
from deploy.release.smoke import SmokeReport
from model.architecture.folder import ModelFolder
from model.errors import DeployError, InputError
from model.serving.deployments import DEPLOYMENTS, Deployment, DeploymentState, DeploymentStore

if TYPE_CHECKING:
    from model.settings import Settings

ASK_TIMEOUT = 5.0
"""Seconds in which a deployment has to answer `story deploy status`; one that sleeps does not."""

Tell = Callable[[str], None]
"""Shows a line of progress."""


class UndecidedError(DeployError):
    """The check could not tell whether a deployment works."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Release:
    """A version that was deployed and passed."""

    deployment: Deployment
    url: str
    version: str
    uploaded: bool
    cold_start_s: float
    """Seconds from its address being known to its being ready."""
    smoke: SmokeReport

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "deployment": self.deployment,
            "url": self.url,
            "version": self.version,
            "uploaded": self.uploaded,
            "cold_start_s": self.cold_start_s,
            "smoke": self.smoke.as_dict(),
        }


def choose_deployment(record: DeploymentState | None, wanted: Deployment | None) -> Deployment:
    """Where a new version goes: the idle deployment. Raises `InputError` when the active one is wanted."""
    if record is None or record.url is None:
        return wanted or "blue"
    if wanted == record.active:
        raise InputError(
            "deployment",
            f"must be {record.idle}, the idle one: {wanted} is active, and readers would see its replacement",
        )
    return record.idle


def release(
    folder: ModelFolder,
    platform: Platform,
    store: DeploymentStore,
    settings: Settings,
    *,
    deployment: Deployment | None,
    patience: float,
    tell: Tell,
) -> Release:
    """Upload, start on the idle deployment, warm, check, and only then note it as ready.

    Raises `DeployError` when it does not come up or fails its check, `UndecidedError` when that stays open.
    """
    record = store.load()
    chosen = choose_deployment(record, deployment)
    uploaded = platform.upload(folder)
    tell(f"{folder.digest[:12]} {'uploaded' if uploaded else 'was uploaded already'}")
    if record is not None and record.urls[chosen] is not None:
        store.set_deployment(chosen, None, None)
    tell(f"starting {chosen} on {platform.name}")
    url = platform.start(chosen, folder.digest)
    tell(f"waking {url}")
    took = smoke.warm(url, settings, version=folder.digest, patience=patience)
    report = checked(chosen, url, settings)
    tell(f"{chosen} passed: {report.reason}")
    store.set_deployment(chosen, url, folder.digest)
    return Release(chosen, url, folder.digest, uploaded, took, report)


def checked(deployment: Deployment, url: str, settings: Settings) -> SmokeReport:
    """The report of a check that passed. Raises `DeployError` or `UndecidedError`."""
    report = smoke.check(url, settings)
    if report.verdict == "failed":
        raise DeployError(f"{deployment} did not pass its check: {report.reason}")
    if report.verdict == "undecided":
        raise UndecidedError(f"{deployment} could not be checked: {report.reason}")
    return report


def switch(
    store: DeploymentStore, settings: Settings, to: Deployment | None, *, patience: float
) -> DeploymentState:
    """Send new stories to the idle deployment (or `to`), once it is awake; a patience of 0 does not ask it."""
    record = store.load()
    if record is not None and patience > 0:
        target = to or record.idle
        url = record.urls[target]
        if url is not None:
            smoke.warm(url, settings, version=record.versions[target], patience=patience)
    return store.switch(to)


def address_of(store: DeploymentStore, deployment: Deployment | None) -> tuple[Deployment, str]:
    """(deployment, address) of the deployment, None for the active one. Raises `DeployError` where there is none."""
    record = store.load()
    if record is None:
        raise DeployError("nothing is deployed yet: run `story deploy deploy`")
    chosen = deployment or record.active
    url = record.urls[chosen]
    if url is None:
        raise DeployError(f"{chosen} has no deployment that passed its check: run `story deploy deploy`")
    return chosen, url


def stop(
    platform: Platform, store: DeploymentStore, deployment: Deployment | None, *, force: bool
) -> tuple[Deployment, bool]:
    """End a deployment, None for the idle one; the active one only if forced. Returns (deployment, whether it ran)."""
    record = store.load()
    if record is None and deployment is None:
        raise DeployError("nothing is deployed yet")
    chosen = deployment or (record.idle if record is not None else "blue")
    if record is not None and record.urls[chosen] is not None:
        if chosen == record.active and not force:
            raise InputError("deployment", f"{chosen} is active; --force ends it all the same")
        store.set_deployment(chosen, None, None)
    return chosen, platform.stop(chosen)


def status(store: DeploymentStore, settings: Settings) -> dict[str, Any]:
    """The record, and what each deployment says of itself; asking may wake a deployment that sleeps."""
    record = store.load()
    told: dict[str, Any] = {
        "store": store.where,
        "active": record.active if record else None,
        "deployments": {},
    }
    if record is None:
        return told
    told |= {"previous": record.previous, "changed": record.changed, "generation": record.generation}
    for deployment in DEPLOYMENTS:
        url = record.urls[deployment]
        entry: dict[str, Any] = {"url": url, "version": record.versions[deployment], "health": "not deployed"}
        if url is not None:
            code, body = smoke.ask_health(url, settings, ASK_TIMEOUT)
            entry |= {"health": body.get("status", f"HTTP {code}"), "ready": code == 200}
            entry |= {name: body[name] for name in ("open", "capacity", "detail") if name in body}
        told["deployments"][deployment] = entry
    return told
