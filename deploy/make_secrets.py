"""Make the missing secrets of `compose.yaml`: random, one file each in `deploy/secrets/`.

Only the folder's owner can open it. The files in it are readable by everyone who can get that far, because a container
sees a mounted secret with the permissions that it has here, and each runs as a user of its own.

    python3 deploy/make_secrets.py
"""

import secrets
import sys
from pathlib import Path
from urllib.parse import quote

FOLDER = Path(__file__).parent / "secrets"


def read_or_make(folder: Path, name: str, value: str = "{}") -> str:
    """Return the secret `name` from its file, or write `value` there and return it.

    `{}` in `value` becomes 24 random bytes, in characters that mean nothing in a URL or a configuration file.
    """
    path = folder / name
    if not path.exists():
        path.write_text(value.format(secrets.token_urlsafe(24)) + "\n", "utf-8")
        path.chmod(0o444)
        print(f"made {path}")
    return path.read_text("utf-8").strip()


def make_all(folder: Path) -> None:
    """Make what is missing. A URL contains the same password as its server's file."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    read_or_make(folder, "grafana_password")
    read_or_make(folder, "metrics_token")
    mlflow = quote(read_or_make(folder, "mlflow_db_password"), safe="")
    read_or_make(folder, "mlflow_database_url", f"postgresql+psycopg://mlflow:{mlflow}@postgres:5432/mlflow")
    stories = quote(read_or_make(folder, "stories_db_password"), safe="")
    read_or_make(folder, "database_url", f"postgresql://stories:{stories}@postgres:5432/stories")
    redis = quote(read_or_make(folder, "redis_auth", "requirepass {}").removeprefix("requirepass "), safe="")
    read_or_make(folder, "redis_url", f"redis://:{redis}@redis:6379/0")


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
