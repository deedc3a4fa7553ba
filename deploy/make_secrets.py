"""Make the missing secrets of `compose.yaml`: random, one file each in `deploy/secrets/`.

Only the folder's owner can open it. The files in it are readable by everyone who can get that far, because a container
sees a mounted secret with the permissions that it has here, and each runs as a user of its own.

    python3 deploy/make_secrets.py
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"


def password() -> str:
    """Return 24 random bytes, in characters that mean nothing in a URL or a configuration file."""
    return secrets.token_urlsafe(24)


def read_or_make(folder: Path, name: str, value: str) -> str:
    """Return the secret `name` from its file, or write `value` there and return it."""
    path = folder / name
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    except FileExistsError:
        return path.read_text("utf-8").rstrip("\r\n")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(handle, 0o444)  # whatever the umask is
        file.write(f"{value}\n")
    print(f"made {path}")
    return value


def make_all(folder: Path) -> None:
    """Make what is missing. A URL contains the same password as its server's file."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    for name in ("mlflow_db_password", "grafana_password", "metrics_token"):
        read_or_make(folder, name, password())
    stories = read_or_make(folder, "stories_db_password", password())
    read_or_make(folder, "database_url", f"postgresql://stories:{stories}@postgres:5432/stories")
    redis = read_or_make(folder, "redis_auth", f"requirepass {password()}").removeprefix("requirepass ")
    read_or_make(folder, "redis_url", f"redis://:{redis}@redis:6379/0")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
