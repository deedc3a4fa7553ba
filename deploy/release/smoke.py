"""Check a deployment: wait until it serves the expected version, and measure a few stories.

Everything goes through the public address and with the proxy token, like any client's request. The check is small on
purpose: it has to end within a minute on a machine that just started, and is no benchmark of quality or load. Its
bounds are the documented ones: three streams at once without an error, no story longer than 15 seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.errors import AccountError, DeployError
from model.settings import Settings

if TYPE_CHECKING:
    from experiments.benchmark.measures import Sample

READY_TIMEOUT = 300.0
"""Seconds that a deployment may take to become ready: a first start builds a container and a snapshot."""
POLL_INTERVAL = 1.0
"""Seconds between two health requests to a deployment that starts."""
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


def ask_health(url: str, settings: Settings, timeout: float) -> tuple[int, dict[str, Any]]:
    """Status and body of the health route; status 0 and a `detail` where nothing answers in time."""
    import httpx

    from model.serving.remote.client import proxy_auth

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


def check(url: str, settings: Settings, *, requests: int = REQUESTS, concurrency: int = CONCURRENCY) -> SmokeReport:
    """Generate a few stories, several at once, and judge. Raises `DeployError` when nothing answers at `url`."""
    from experiments.benchmark.load import LoadGenerator
    from experiments.benchmark.plan import Plan
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
