"""Bring a version onto the idle deployment, check it, and send traffic from one deployment to the other.

A deployment counts as ready, and can be switched to, only while the state holds an address for it. `release` removes
that address before it replaces the deployment and sets it when the new version has passed its check, so a deployment
that failed half way never receives a request.

The check goes through the public address and with the proxy token, like any client's request. It is small on purpose:
it has to end within a minute on a machine that just started, and is no benchmark of quality or load. Its bounds are the
documented ones: three streams at once without an error, no story longer than 15 seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.release.platforms import Platform
from model.architecture.folder import ModelFolder
from model.errors import DeployError, InputError
from model.serving.deployments import DEPLOYMENTS, Deployment, DeploymentState, DeploymentStore
from model.serving.remote.readiness import ask_health, wait_until_ready
from model.settings import Settings

if TYPE_CHECKING:
    from experiments.benchmark.measures import Sample

REQUESTS = 12
CONCURRENCY = 3
MAX_TOKENS = 64
LONGEST_GENERATION = 15.0
"""Seconds; `max_generation_time` of the documented thresholds."""


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """The result of a check. `verdict` is `passed`, `failed` or `undecided`; times are in seconds."""

    verdict: str
    reason: str
    requests: int
    success_rate: float
    concurrent_handling: int
    """Streams requested at once."""
    max_generation_time: float
    avg_generation_time: float
    ttft_max: float
    total_tokens_per_second: float


def check(url: str, settings: Settings, *, requests: int = REQUESTS, concurrency: int = CONCURRENCY) -> SmokeReport:
    """Generate a few stories, several at once, and judge. Raises `DeployError` when nothing answers at `url`."""
    from experiments.benchmark.load import LoadGenerator, Plan
    from experiments.benchmark.targets import UnreachableError, WebTarget
    from model.serving.remote.client import proxy_auth

    target = WebTarget(url, headers=proxy_auth(settings))
    plan = Plan(requests=requests, max_tokens=MAX_TOKENS)

    async def measure() -> list[Sample]:
        async with target.running():
            return await LoadGenerator(plan).closed_loop(target, "concurrent", concurrency)

    try:
        return judge(asyncio.run(measure()), concurrency)
    except UnreachableError as error:
        raise DeployError(str(error)) from None


def judge(samples: Sequence[Sample], concurrency: int) -> SmokeReport:
    """Return the verdict over these requests."""
    from experiments.benchmark.measures import wall_time

    good = [sample for sample in samples if sample.ok]
    failed = [sample for sample in samples if not sample.ok]
    broken = [sample for sample in failed if sample.error != "busy"]
    times = [sample.generation_time for sample in good]
    longest = max(times, default=0.0)
    if broken:
        verdict, reason = "failed", f"{len(failed)} of {len(samples)} stories failed: {broken[0].message}"
    elif longest > LONGEST_GENERATION:
        verdict, reason = "failed", f"a story took {longest:.1f} s, allowed are {LONGEST_GENERATION:.0f}"
    elif failed:
        verdict, reason = "undecided", f"{len(failed)} of {len(samples)} requests were refused: it is busy"
    else:
        verdict = "passed"
        reason = f"{len(samples)} stories, {concurrency} at once, the longest {longest:.1f} s"
    seconds = wall_time(samples)
    return SmokeReport(
        verdict=verdict,
        reason=reason,
        requests=len(samples),
        success_rate=len(good) / len(samples) if samples else 0.0,
        concurrent_handling=concurrency,
        max_generation_time=longest,
        avg_generation_time=sum(times) / len(times) if times else 0.0,
        ttft_max=max((sample.ttft or 0.0 for sample in good), default=0.0),
        total_tokens_per_second=sum(sample.tokens for sample in good) / seconds if seconds else 0.0,
    )


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
    took = wait_until_ready(url, settings, version=folder.digest, timeout=timeout)
    report = check(url, settings)
    if report.verdict == "failed":
        raise DeployError(f"{chosen} did not pass its check: {report.reason}")
    if report.verdict == "undecided":
        raise UndecidedError(f"{chosen} could not be checked: {report.reason}")
    progress(f"{chosen} passed: {report.reason}")
    store.set_deployment(chosen, url, folder.digest)
    return Release(chosen, url, folder.digest, uploaded, took, report)


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
            code, body = ask_health(url, settings, STATUS_TIMEOUT)
            entry |= {"health": body.get("status", f"HTTP {code}"), "ready": code == 200}
            entry |= {key: body[key] for key in ("open", "capacity", "detail") if key in body}
        result["deployments"][name] = entry
    return result
