"""The image's health check: exit with 0 if the app in this container is healthy, else with 1.

It runs several times a minute for as long as the app does, so it imports nothing but the standard library and needs
no curl. It asks at PORT, where the app listens.
"""

import contextlib
import http.client
import os
import sys

TIMEOUT = 4
"""Seconds; less than the health check's own timeout, so that the reason is printed."""


def main() -> int:
    """Ask once and print the response."""
    port = int(os.environ.get("PORT") or 7860)
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
            connection.request("GET", "/api/health")
            response = connection.getresponse()
            print(response.status, response.read(400).decode(errors="replace"))
            return 0 if response.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print(f"port {port} does not answer: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
