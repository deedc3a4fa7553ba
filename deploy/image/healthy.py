"""Says by its exit code whether the app of this container could write a story now: 0 yes, 1 no.

The image's health check. It runs several times a minute for as long as the app does, so it imports nothing of the
project and no package, and it needs no curl. It listens to PORT as the app does.
"""

from __future__ import annotations

import http.client
import os
import sys

PATIENCE = 4
"""Seconds; less than the health check's own time-out, so that the reason is told."""


def main() -> int:
    """Ask once and print what was answered."""
    port = int(os.environ.get("PORT") or 7860)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/api/health")
        answer = connection.getresponse()
        print(answer.status, answer.read(400).decode(errors="replace"))
        return 0 if answer.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print(f"port {port} does not answer: {error}")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
