"""A deployment on Render that counts only once the new model answers, and a word about how it went.

`python3 deploy/render.py deploy` asks Render for a deployment of this commit (or, of a service that runs a prebuilt
image, of `IMAGE`), waits until Render calls it live, and then until `/api/health` of the app answers, several times in
a row, with the model whose digest lies in `model/pretrained/digest`. `python3 deploy/render.py notify` posts one line
to a webhook. Only Python itself is needed, so that the job with the keys installs nothing.

Environment: `RENDER_API_KEY`, `RENDER_SERVICE_ID`, `APP_URL`, `GITHUB_SHA`, `IMAGE` (name@digest), `RENDER_API`
(another address of the interface), `NOTIFY_URL` (unset: nothing is posted), `OUTCOME` (of the deployment).
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "https://api.render.com/v1"
DIGEST = Path(__file__).resolve().parents[1] / "model" / "pretrained" / "digest"
FAILED = ("build_failed", "update_failed", "pre_deploy_failed", "canceled", "deactivated")
SECONDS = 30.0
"""That one request may take."""


class DeployError(Exception):
    """The deployment failed; the message says how in one line, without a key."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long is waited for what."""

    live: float = 1800.0
    """Seconds until Render must call the deployment live."""
    healthy: float = 300.0
    """Seconds from then until the app must answer with the new model."""
    pause: float = 10.0
    """Seconds between two looks."""
    in_a_row: int = 3
    """Answers with the new model that are wanted: behind a balancer one of several instances may still be old."""


def deploy(environment: Mapping[str, str], pace: Pace, *, sleep: Callable[[float], None] = time.sleep) -> str:
    """Deploy and wait; returns what is live, in one line.

    Raises:
        DeployError: a variable is missing, Render refused or failed, or the app did not answer with the new model.
    """
    key, service, app = (
        _needed(environment, name) for name in ("RENDER_API_KEY", "RENDER_SERVICE_ID", "APP_URL")
    )
    wanted = DIGEST.read_text("ascii").strip()
    root = f"{environment.get('RENDER_API') or API}/services/{service}"

    def ask(path: str, body: dict[str, str] | None = None) -> Any:
        return _ask(root + path, key=key, body=body)

    details = ask("").get("serviceDetails") or {}
    if "image" in (details.get("runtime"), details.get("env")):
        what = {"imageUrl": _needed(environment, "IMAGE")}
    else:
        what = {"commitId": _needed(environment, "GITHUB_SHA")}
    number = str(ask("/deploys", what)["id"])
    print(f"deployment {number} of {next(iter(what.values()))}", flush=True)
    _wait_until_live(lambda: str(ask(f"/deploys/{number}")["status"]), pace, sleep)
    version = _wait_until_healthy(f"{app.rstrip('/')}/api/health", wanted, pace, sleep)
    return f"live: version {version}, model {wanted[:12]}"


def notify(environment: Mapping[str, str]) -> str:
    """Post how the deployment went to `NOTIFY_URL`; returns what was done. Raises `DeployError`."""
    url = environment.get("NOTIFY_URL")
    if not url:
        return "no NOTIFY_URL, so nobody is told"
    outcome = environment.get("OUTCOME") or "unknown"
    text = (
        f"{environment.get('GITHUB_REPOSITORY', 'write-me-a-story')} {environment.get('GITHUB_SHA', '')[:12]}: "
        f"deployment {outcome}. {environment.get('APP_URL', '')}"
    )
    _ask(url, body={"text": text.strip(), "content": text.strip()}, name="the webhook")
    return "told"


def _wait_until_live(status: Callable[[], str], pace: Pace, sleep: Callable[[float], None]) -> None:
    until, before = time.monotonic() + pace.live, ""
    while (now := status()) != "live":
        if now != before:
            print(f"Render: {now}", flush=True)
        if now in FAILED:
            raise DeployError(f"Render: {now}; its log tells why")
        if time.monotonic() > until:
            raise DeployError(f"Render still says {now} after {pace.live:g} s")
        before = now
        sleep(pace.pause)


def _wait_until_healthy(url: str, wanted: str, pace: Pace, sleep: Callable[[float], None]) -> str:
    until, good, seen = time.monotonic() + pace.healthy, 0, "no answer"
    while True:
        try:
            health = _ask(url, name="/api/health")
            found, seen = str(health["model"]["version"]), f"model {health['model']['version']}"
            good = good + 1 if health["status"] == "ok" and found == wanted else 0
        except (DeployError, KeyError, TypeError) as error:
            good, seen = 0, str(error) or type(error).__name__
        if good == pace.in_a_row:
            return str(health.get("version", "unknown"))
        if time.monotonic() > until:
            raise DeployError(
                f"after {pace.healthy:g} s the app does not answer with {wanted[:12]}: {seen[:200]}"
            )
        sleep(pace.pause)


def _ask(url: str, *, key: str = "", body: dict[str, str] | None = None, name: str = "Render") -> Any:
    """JSON of an answer, {} of an empty or another one. Raises `DeployError`, which names no address and no key."""
    headers = {
        "Accept": "application/json",
        "Content-Type": "application/json",
        "User-Agent": "write-me-a-story",
    }
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise DeployError(f"{name} answered {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DeployError(f"{name} did not answer: {type(reason).__name__}") from None
    try:
        return json.loads(content)
    except ValueError:
        return {}


def _needed(environment: Mapping[str, str], name: str) -> str:
    if value := environment.get(name):
        return value
    raise DeployError(f"{name} is not set")


def main(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ, pace: Pace | None = None
) -> int:
    """Run one of the two; returns the exit code."""
    if list(arguments) not in (["deploy"], ["notify"]):
        print("usage: render.py deploy|notify", file=sys.stderr)
        return 2
    try:
        print(deploy(environment, pace or Pace()) if arguments[0] == "deploy" else notify(environment))
    except DeployError as error:
        print(f"render: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
