"""Check a deployment: wait until it serves the expected version, and measure a few stories.

Everything goes through the public address and with the proxy token, like any client's request. The check is small on
purpose: it has to end within a minute on a machine that just started, and is no benchmark of quality or load. Its
bounds are the documented ones: three streams at once without an error, no story longer than 15 seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.errors import AccountError, DeployError

if TYPE_CHECKING:
    import httpx

    from model.settings import Settings

READY_TIMEOUT = 300.0
"""Seconds that a deployment may take to become ready: a first start builds a container and a snapshot."""
POLL_INTERVAL = 1.0
"""Seconds between two health requests to a deployment that starts."""
CONNECT = 10.0
"""Seconds in which a connection must be made."""
SILENCE = 60.0
"""Seconds without a byte after which a story counts as broken off."""

STORIES = 12
AT_ONCE = 3
TOKENS = 64
LONGEST_STORY = 15.0
"""Seconds; `max_generation_time` of the documented thresholds."""
PROMPTS = (
    "Once upon a time, there was a little robot who",
    "Lily and Tom found a map in the garden.",
    "The small boat had a secret.",
)


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """What the check saw. `verdict` is `passed`, `failed` or `undecided`."""

    verdict: str
    reason: str
    requests: int
    success_rate: float
    concurrent_handling: int
    """Stories that were asked for at once."""
    max_generation_time: float
    """Seconds, from the request to the end of the story, as are the next two."""
    avg_generation_time: float
    ttft_max: float
    """Seconds from the request to the first text."""
    total_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Told:
    """One story of the check: its times in seconds, its tokens as the server counted them, or why it failed."""

    seconds: float
    first: float
    tokens: int
    fault: str | None
    busy: bool = False


def headers(settings: Settings) -> dict[str, str]:
    """The proxy token, where there is one."""
    if settings.modal_key is None or settings.modal_secret is None:
        return {}
    return {"Modal-Key": settings.modal_key, "Modal-Secret": settings.modal_secret.get_secret_value()}


def ask_health(url: str, settings: Settings, timeout: float) -> tuple[int, dict[str, Any]]:
    """Status and body of the health route; status 0 and a `detail` where nothing answers in time."""
    import httpx

    try:
        answer = httpx.get(f"{url}/api/health", headers=headers(settings), timeout=timeout)
    except httpx.HTTPError as error:
        return 0, {"status": "unreachable", "detail": str(error) or type(error).__name__}
    try:
        body = answer.json()
    except ValueError:
        body = None
    return answer.status_code, body if isinstance(body, dict) else {"status": f"HTTP {answer.status_code}"}


def wait_until_ready(
    url: str, settings: Settings, *, version: str | None, timeout: float = READY_TIMEOUT
) -> float:
    """Wait until `url` is healthy and serves `version`, if one is given; return the seconds it took.

    Raises:
        AccountError: it requires a proxy token, or refuses the one it got.
        DeployError: it is not ready within `timeout`, or serves another version all that time.
    """
    began = time.monotonic()
    while True:
        status, body = ask_health(url, settings, timeout=max(1.0, min(30.0, timeout)))
        if status in (401, 403):
            raise AccountError(
                f"{url} asks for a proxy token: set MODAL_KEY and MODAL_SECRET to the two halves of one"
            )
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


def check(url: str, settings: Settings, *, stories: int = STORIES, at_once: int = AT_ONCE) -> SmokeReport:
    """Write `stories` stories, `at_once` at a time, and judge."""
    return asyncio.run(_check(url, settings, stories, at_once))


async def _check(url: str, settings: Settings, stories: int, at_once: int) -> SmokeReport:
    import httpx

    places = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, number: int) -> Told:
        async with places:
            return await _tell(client, PROMPTS[number % len(PROMPTS)], number)

    timeout = httpx.Timeout(SILENCE, connect=CONNECT)
    async with httpx.AsyncClient(base_url=url, headers=headers(settings), timeout=timeout) as client:
        began = time.monotonic()
        told = await asyncio.gather(*(one(client, number) for number in range(stories)))
        took = time.monotonic() - began
    return judge(told, at_once=at_once, took=took)


def judge(told: list[Told], *, at_once: int, took: float) -> SmokeReport:
    """The verdict over some stories that took `took` seconds together."""
    good = [story for story in told if story.fault is None]
    faults = [story for story in told if story.fault is not None]
    times = [story.seconds for story in good]
    longest = max(times, default=0.0)
    if any(not story.busy for story in faults):
        broken = next(story for story in faults if not story.busy)
        verdict, reason = "failed", f"{len(faults)} of {len(told)} stories failed: {broken.fault}"
    elif longest > LONGEST_STORY:
        verdict, reason = "failed", f"a story took {longest:.1f} s, allowed are {LONGEST_STORY:.0f}"
    elif faults:
        verdict, reason = "undecided", f"{len(faults)} of {len(told)} stories were turned away: it is busy"
    else:
        verdict, reason = "passed", f"{len(told)} stories, {at_once} at once, the longest {longest:.1f} s"
    return SmokeReport(
        verdict=verdict,
        reason=reason,
        requests=len(told),
        success_rate=len(good) / len(told) if told else 0.0,
        concurrent_handling=at_once,
        max_generation_time=longest,
        avg_generation_time=sum(times) / len(times) if times else 0.0,
        ttft_max=max((story.first for story in good), default=0.0),
        total_tokens_per_second=sum(story.tokens for story in good) / took if took else 0.0,
    )


async def _tell(client: httpx.AsyncClient, prompt: str, seed: int) -> Told:
    import httpx

    began = time.monotonic()
    first: float | None = None
    tokens = 0
    finished = False
    try:
        async for event in _events(client, _body(prompt, TOKENS, seed)):
            if any(choice.get("text") for choice in event["choices"]) and first is None:
                first = time.monotonic() - began
            finished = finished or any(choice.get("finish_reason") for choice in event["choices"])
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    except _Refused as refused:
        return Told(time.monotonic() - began, 0.0, 0, str(refused), busy=refused.status == 429)
    except httpx.HTTPError as error:
        return Told(time.monotonic() - began, 0.0, 0, str(error) or type(error).__name__)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return Told(time.monotonic() - began, 0.0, 0, f"not an answer of the story service ({error!r})")
    took = time.monotonic() - began
    if first is None or not finished or not tokens:
        return Told(took, 0.0, tokens, "the stream ended without a whole story")
    return Told(took, first, tokens, None)


def stream_story(url: str, prompt: str, settings: Settings, *, max_tokens: int = 200) -> Iterator[str]:
    """Yield a story's text as it arrives. Raises `DeployError` when there is none."""
    import httpx
    from httpx_sse import connect_sse

    timeout = httpx.Timeout(READY_TIMEOUT, connect=CONNECT)  # the deployment may be scaled to zero
    body = _body(prompt, max_tokens, None)
    try:
        with (
            httpx.Client(headers=headers(settings), timeout=timeout) as client,
            connect_sse(client, "POST", f"{url}/v1/completions", json=body) as source,
        ):
            source.response.raise_for_status()
            for event in source.iter_sse():
                if event.data == "[DONE]":
                    return
                for choice in json.loads(event.data)["choices"]:
                    yield choice["text"]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise DeployError(f"{url} generated no story: {error}") from None


class _Refused(Exception):
    """An answer that is no story."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _body(prompt: str, max_tokens: int, seed: int | None) -> dict[str, Any]:
    usage = {"include_usage": True}
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "stream_options": usage}
    return body if seed is None else {**body, "seed": seed}


async def _events(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    from httpx_sse import aconnect_sse

    async with aconnect_sse(client, "POST", "/v1/completions", json=body) as source:
        answer = source.response
        if answer.status_code != 200:
            await answer.aread()
            raise _Refused(answer.status_code, f"HTTP {answer.status_code}")
        async for message in source.aiter_sse():
            if message.data == "[DONE]":
                return
            event = json.loads(message.data)
            if "error" in event:
                raise _Refused(answer.status_code, str(event["error"]["message"]))
            yield event
