"""Run the app as the image will, generate a story with it, and keep the bytecode of all modules that it imports.

An image without bytecode compiles every module at each start, which costs several seconds; bytecode of everything
costs some 40 MB, most of it for modules that serving never imports. So the build runs the app once, and Python writes
the bytecode of what it imports, the standard library included, below PYTHONPYCACHEPREFIX. All of it is then marked as
valid without a check of the source, whose time stamps a registry may change. A second run uses it. Both runs are also
a test: the build fails if the app cannot show the page, stream a story and stop cleanly.

    PYTHONPYCACHEPREFIX=/opt/story/bytecode python deploy/image/warm.py story demo --host 127.0.0.1
"""

import contextlib
import os
import py_compile
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import httpx

from model.serving.http.server import free_port

TIMEOUT = 300
"""Seconds for a start without bytecode on a slow and busy builder, and for a stop."""
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
STORY = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 1, "stream": True}


class WarmError(Exception):
    """What the app failed to do, in one line."""


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Wait for the app. Raises `WarmError` if it exits or is not healthy within `TIMEOUT`."""
    began = time.monotonic()
    while time.monotonic() < began + TIMEOUT:
        if process.poll() is not None:
            raise WarmError(f"the app ended with exit code {process.returncode} before it served")
        with contextlib.suppress(httpx.TransportError):
            if client.get("/api/health").status_code == 200:
                return
        time.sleep(0.05)
    raise WarmError(f"the app was not healthy within {TIMEOUT} seconds")


def try_app(command: list[str], *, write_bytecode: bool) -> dict[str, float]:
    """Run the app by `command`, use each part of it once and stop it; return how many seconds each step took.

    Raises `WarmError` or `httpx.HTTPError` when it did not start, answer, generate or stop as it should.
    """
    port = free_port()
    flag = "" if write_bytecode else "1"  # empty counts as unset
    began = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, "PORT": str(port), "PYTHONDONTWRITEBYTECODE": flag})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
            wait_until_healthy(client, process)
            took = {"healthy after": time.monotonic() - began}
            for path in ("/", "/config", "/metrics", "/v1/models", "/socket.io/?EIO=4&transport=polling"):
                answer = client.get(path).raise_for_status()
                if path == "/" and "gradio" not in answer.text.lower():
                    raise WarmError("/ is not the page")
            began = time.monotonic()
            events = client.post("/api/generate", json=STORY).raise_for_status().text
            if events.count("data:") < 10:
                raise WarmError(f"the app streamed no story, but {events[:200]!r}")
            took["a story of 40 tokens"] = time.monotonic() - began
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(TIMEOUT)
        if code != 0:
            raise WarmError(f"the app answered SIGTERM with exit code {code}")
        return took | {"stopped within": time.monotonic() - began}
    except subprocess.TimeoutExpired:
        raise WarmError(f"the app still ran {TIMEOUT} seconds after SIGTERM") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def mark_valid(bytecode: Path) -> int:
    """Make all bytecode below `bytecode` valid without a check of its source; return the number of modules."""
    count = 0
    for compiled in sorted(bytecode.rglob("*.pyc")):
        module = compiled.name.split(".", 1)[0] + ".py"
        source = Path("/", *compiled.parent.relative_to(bytecode).parts, module)
        if source.is_file():
            with warnings.catch_warnings(action="ignore"):  # of invalid escapes in packages' strings
                py_compile.compile(str(source), str(compiled), doraise=True, invalidation_mode=UNCHECKED)
            count += 1
        else:
            compiled.unlink()  # of a file that only the build had
    return count


def main(command: list[str]) -> int:
    """Try the app that `command` starts and keep its bytecode. Exit code 1: it does not work, 2: bad use."""
    prefix = os.environ.get("PYTHONPYCACHEPREFIX")
    if not command or not prefix:
        print("usage: PYTHONPYCACHEPREFIX=DIR python deploy/image/warm.py COMMAND…", file=sys.stderr)
        return 2
    try:
        try_app(command, write_bytecode=True)
        print(f"bytecode of {mark_valid(Path(prefix))} modules in {prefix}; with it:")
        for step, seconds in try_app(command, write_bytecode=False).items():
            print(f"{step} {seconds:.2f} s")
    except (WarmError, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
