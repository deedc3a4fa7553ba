"""Start MLflow's server on PostgreSQL, with a password that comes from a file.

MLflow takes its database as one URL that includes the password. Here the URL and the file with the password are two
settings, and the result goes to the server in its environment, so that no process list shows it. The server stores
artifacts itself (clients need no access to the volume) and answers only for the allowed host names.

Environment: `DATABASE` (without a password), `PASSWORD_FILE`, `ALLOWED_HOSTS`; `HOST`, `PORT`, `ARTIFACTS` and
`WORKERS` have defaults for the container.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit


def with_password(address: str, password: str) -> str:
    """Return `scheme://user@host/db` with the password inserted, quoted."""
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at or ":" in user:
        raise SystemExit("DATABASE must name a user and no password, as postgresql+psycopg://mlflow@postgres/mlflow")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def command(environment: Mapping[str, str]) -> list[str]:
    """Return MLflow's command line."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", environment.get("HOST", "0.0.0.0"), "--port", environment.get("PORT", "5000")),
        *("--workers", environment.get("WORKERS", "2")),
        "--serve-artifacts",
        *("--artifacts-destination", environment.get("ARTIFACTS", "/artifacts")),
        *("--allowed-hosts", environment["ALLOWED_HOSTS"]),
    ]


def main() -> None:
    """Replace this process by the server. Exit with one line when a setting is missing."""
    missing = [name for name in ("DATABASE", "PASSWORD_FILE", "ALLOWED_HOSTS") if not os.environ.get(name)]
    if missing:
        raise SystemExit(f"{', '.join(missing)} must be set")
    try:
        password = Path(os.environ["PASSWORD_FILE"]).read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise SystemExit(f"PASSWORD_FILE cannot be read: {error.strerror}") from None
    address = with_password(os.environ["DATABASE"], password)
    started = command(os.environ)
    os.execve(started[0], started, {**os.environ, "MLFLOW_BACKEND_STORE_URI": address})


if __name__ == "__main__":
    main()
