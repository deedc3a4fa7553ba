"""Makes the secrets of `compose.yaml`: one file each in `deploy/secrets/`, random, and only those that are missing.

The folder can be opened by its owner alone. The files in it can be read by everyone who gets that far, for a container
sees a mounted secret with the rights that it has here, and each runs as a user of its own.

    python3 deploy/make_secrets.py
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"
BYTES = 24
"""Of chance in each password; they are written in letters that mean nothing in an address or a configuration."""


def read_or_make(folder: Path, name: str, value: str) -> str:
    """The secret `name`: what its file holds, or else `value`, which is then written there."""
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
    """Make what is missing. What consists of a password says the same one as its file."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)

    def password() -> str:
        return secrets.token_urlsafe(BYTES)

    read_or_make(folder, "mlflow_db_password", password())
    read_or_make(folder, "grafana_password", password())
    read_or_make(folder, "metrics_token", password())
    stories = read_or_make(folder, "stories_db_password", password())
    read_or_make(folder, "database_url", f"postgresql://stories:{stories}@postgres:5432/stories")
    redis = read_or_make(folder, "redis_auth", f"requirepass {password()}").removeprefix("requirepass ")
    read_or_make(folder, "redis_url", f"redis://:{redis}@redis:6379/0")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
