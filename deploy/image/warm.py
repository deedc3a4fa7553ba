"""Starts the app as the image will, writes a story with it, and keeps the bytecode of all that was imported.

An image without bytecode compiles every module at each start, which costs several seconds; bytecode of everything
costs some 40 MB, most of it for modules that serving never imports. So the app is run once while the image is built,
and Python writes the bytecode of what it imports, its own library included, below PYTHONPYCACHEPREFIX. Then all of it
is marked as valid without a look at the source, whose time stamps a registry may change. A
second run uses it. Both are also a test: an image whose app cannot show the page, tell a story and stop cleanly is not
built.

    PYTHONPYCACHEPREFIX=/opt/story/bytecode python deploy/image/warm.py story demo --host 127.0.0.1
"""

from __future__ import annotations

import json
import os
import py_compile
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

from model.serving.http.address import free_port

PATIENCE = 300
"""Seconds for a start without bytecode on a slow and busy builder, and for a stop."""
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
STORY = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 1, "stream": True}


class ColdError(Exception):
    """In one line: what the app did not do."""


def ask(url: str, body: dict[str, object] | None = None) -> str:
    """The text behind an address, fetched or, with a body, asked for. Raises `ColdError` for any other answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text
    except OSError as error:  # `HTTPError` and `URLError` are among them
        raise ColdError(f"{url}: {error}") from None


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> float:
    """Seconds until the app says that a story could be written. Raises `ColdError` if it ends or never does."""
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE:
        if process.poll() is not None:
            raise ColdError(f"the app ended with exit code {process.returncode} before it served")
        try:
            ask(f"{url}/api/health")
        except ColdError:
            time.sleep(0.05)
        else:
            return time.monotonic() - began
    raise ColdError(f"the app was not healthy within {PATIENCE} seconds")


def try_out(command: list[str], *, write_bytecode: bool) -> dict[str, float]:
    """Run the app by `command`, use all of it once, stop it; how long each part took, in seconds.

    Raises:
        ColdError: it did not start, answer, write or stop as it should.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    own = {
        "PORT": str(port),
        "PYTHONDONTWRITEBYTECODE": "" if write_bytecode else "1",
    }  # empty counts as unset
    process = subprocess.Popen(command, env={**os.environ, **own})
    try:
        took = {"healthy after": wait_until_healthy(url, process)}
        if "gradio" not in ask(f"{url}/").lower():
            raise ColdError(f"{url}/ is not the page")
        for path in ("config", "metrics", "v1/models", "socket.io/?EIO=4&transport=polling"):
            ask(f"{url}/{path}")
        began = time.monotonic()
        told = ask(f"{url}/api/generate", STORY)
        if told.count("data:") < 10:
            raise ColdError(f"the app streamed no story, but {told[:200]!r}")
        took["a story of 40 tokens"] = time.monotonic() - began
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise ColdError(f"the app still ran {PATIENCE} seconds after SIGTERM") from None
        if code != 0:
            raise ColdError(f"the app answered SIGTERM with exit code {code}")
        took["stopped within"] = time.monotonic() - began
        return took
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def keep(bytecode: Path) -> int:
    """Make all bytecode below `bytecode` valid as it stands, and return how many modules that is."""
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
    """Try the app out by `command` and keep the bytecode. Exit code 1: it does not work, 2: bad use."""
    prefix = os.environ.get("PYTHONPYCACHEPREFIX")
    if not command or not prefix:
        print("usage: PYTHONPYCACHEPREFIX=DIR python deploy/image/warm.py COMMAND…", file=sys.stderr)
        return 2
    try:
        try_out(command, write_bytecode=True)
        print(f"bytecode of {keep(Path(prefix))} modules in {prefix}; with it:")
        for what, seconds in try_out(command, write_bytecode=False).items():
            print(f"{what} {seconds:.2f} s")
    except ColdError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
