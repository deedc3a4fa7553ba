"""Deploy on Render and wait until the new model answers; post the outcome to a webhook.

`python3 deploy/render.py deploy` asks Render for a deployment of this commit (or, for a service that runs a prebuilt
image, of `IMAGE`), waits until Render calls it live, and then until `/api/health` of the app reports the model in
`model/pretrained/digest`, several times in a row. `python3 deploy/render.py notify` posts one line to a webhook. Only
the standard library is needed, so that the job with the keys installs nothing.

Environment: `RENDER_API_KEY`, `RENDER_SERVICE_ID`, `APP_URL`, `GITHUB_SHA`, `IMAGE` (name@digest), `RENDER_API`
(another address of the API), `NOTIFY_URL` (unset: nothing is posted), `OUTCOME` (of the deployment).
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "https://api.render.com/v1"
DIGEST = Path(__file__).resolve().parents[1] / "model" / "pretrained" / "digest"
FAILED = ("build_failed", "update_failed", "pre_deploy_failed", "canceled", "deactivated")
REQUEST_TIMEOUT = 30.0
"""Seconds."""


class RenderError(Exception):
    """The deployment failed; the message is one line and holds no key."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to wait, in seconds."""

    live: float = 1800.0
    """Until Render must call the deployment live."""
    healthy: float = 300.0
    """From then until the app must answer with the new model."""
    interval: float = 10.0
    """Between two requests."""
    in_a_row: int = 3
    """Answers with the new model that are needed: behind a balancer one of several instances may still be old."""


def deploy(environment: Mapping[str, str], timing: Timing) -> str:
    """Deploy and wait; return what is live, in one line.

    Raises:
        RenderError: a variable is missing, Render refused or failed, or the app did not answer with the new model.
    """
    key, service, app = (_required(environment, name) for name in ("RENDER_API_KEY", "RENDER_SERVICE_ID", "APP_URL"))
    digest = DIGEST.read_text("ascii").strip()
    root = f"{environment.get('RENDER_API') or API}/services/{service}"
    details = _request(root, key=key).get("serviceDetails") or {}
    if "image" in (details.get("runtime"), details.get("env")):
        source = {"imageUrl": _required(environment, "IMAGE")}
    else:
        source = {"commitId": _required(environment, "GITHUB_SHA")}
    number = str(_request(f"{root}/deploys", key=key, body=source)["id"])
    print(f"deployment {number} of {next(iter(source.values()))}", flush=True)
    _wait_until_live(f"{root}/deploys/{number}", key, timing)
    version = _wait_until_healthy(f"{app.rstrip('/')}/api/health", digest, timing)
    return f"live: version {version}, model {digest[:12]}"


def notify(environment: Mapping[str, str]) -> str:
    """Post the outcome of the deployment to `NOTIFY_URL`; return what was done. Raises `RenderError`."""
    url = environment.get("NOTIFY_URL")
    if not url:
        return "no NOTIFY_URL, nothing is posted"
    text = (
        f"{environment.get('GITHUB_REPOSITORY', 'write-me-a-story')} {environment.get('GITHUB_SHA', '')[:12]}: "
        f"deployment {environment.get('OUTCOME') or 'unknown'}. {environment.get('APP_URL', '')}"
    ).strip()
    _request(url, body={"text": text, "content": text}, name="the webhook")
    return "posted"


def _wait_until_live(url: str, key: str, timing: Timing) -> None:
    deadline, before = time.monotonic() + timing.live, ""
    while (status := str(_request(url, key=key)["status"])) != "live":
        if status != before:
            print(f"Render: {status}", flush=True)
        if status in FAILED:
            raise RenderError(f"Render: {status}; see its log")
        if time.monotonic() > deadline:
            raise RenderError(f"Render still says {status} after {timing.live:g} s")
        before = status
        time.sleep(timing.interval)


def _wait_until_healthy(url: str, digest: str, timing: Timing) -> str:
    deadline, good, seen = time.monotonic() + timing.healthy, 0, "no answer"
    while True:
        try:
            health = _request(url, name="/api/health")
            found = str(health["model"]["version"])
            seen = f"model {found}"
            good = good + 1 if health["status"] == "healthy" and found == digest else 0
        except (RenderError, KeyError, TypeError) as error:
            good, seen = 0, str(error) or type(error).__name__
        if good == timing.in_a_row:
            return str(health.get("version", "unknown"))
        if time.monotonic() > deadline:
            raise RenderError(f"after {timing.healthy:g} s the app does not answer with {digest[:12]}: {seen[:200]}")
        time.sleep(timing.interval)


def _request(url: str, *, key: str = "", body: dict[str, str] | None = None, name: str = "Render") -> Any:
    """Return the JSON of a response, {} if it holds none. Raises `RenderError`, which names no address and no key."""
    headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "write-me-a-story"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise RenderError(f"{name} answered {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RenderError(f"{name} did not answer: {type(reason).__name__}") from None
    try:
        return json.loads(content)
    except ValueError:
        return {}


def _required(environment: Mapping[str, str], name: str) -> str:
    if value := environment.get(name):
        return value
    raise RenderError(f"{name} is not set")


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ, timing: Timing | None = None) -> int:
    """Run `deploy` or `notify`; return the exit code."""
    if list(arguments) not in (["deploy"], ["notify"]):
        print("usage: render.py deploy|notify", file=sys.stderr)
        return 2
    try:
        print(deploy(environment, timing or Timing()) if arguments[0] == "deploy" else notify(environment))
    except RenderError as error:
        print(f"render: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
