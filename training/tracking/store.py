"""Open the project's MLflow store, and mark runs whose process has died.

MLflow takes about 3 s to import, so this file imports it only inside its functions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from model.errors import InputError, MissingExtraError, one_line
from model.settings import load_settings, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
OWNER, LAST_SEEN = "owner", "last_seen"
"""Tags of a run: whose it is (`training.tracking.store.Owner`), and when it last reported (ms since 1970)."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Standard output belongs to `--json`.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Bars for files that are copied in a moment.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The defaults (7 tries, 120 s each) make a run whose server is gone wait for minutes at its end.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
TALKATIVE = {
    # Each try at a locked database would be a trace; the error is raised too, or the outbox tries again.
    "mlflow.store.db.utils": logging.CRITICAL,
    "alembic": logging.WARNING,
    "mlflow.pyfunc": logging.WARNING,
    "mlflow.store.model_registry": logging.WARNING,
    # A store that is gone is said once, by whoever sends to it, and not for every try.
    "mlflow.system_metrics.system_metrics_monitor": logging.CRITICAL,
    "urllib3.connectionpool": logging.ERROR,
}
"""Loggers that would tear a progress bar, and what they may still say."""
READER_MARK = 129
LOCK_SECONDS = 60
"""How long a SQLite database may be locked by another process before that is an error."""
LOCK_NOTICE = 2.0
"""Seconds after which a command says that it waits for such a lock."""
LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Tables and columns of MLflow's database that hold the absolute locations of artifacts."""


def default_tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db`: a database in the working directory."""
    return load_settings().mlflow_tracking_uri


def open_store(uri: str, *, read_only: bool = False) -> MlflowClient:
    """Connect to the store at `uri`; a SQLite database is created if missing, unless it is opened `read_only`.

    Raises `InputError` for a store that cannot be used, `MissingExtraError` without MLflow.
    """
    for name, value in (QUIET | _credentials()).items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        raise MissingExtraError("tracking runs", "train") from error
    for logger, level in TALKATIVE.items():
        logging.getLogger(logger).setLevel(level)
    try:
        address = uri
        if (database := database_file(uri)) and read_only:
            if not database.is_file():
                raise FileNotFoundError(f"{database.name} is not there")
            address = _read_only(database)
        elif database:
            database.parent.mkdir(parents=True, exist_ok=True)
            follow_database(database)
            # Absolute: MLflow locks a file in the folder for temporary files that is named by the address, so users who
            # each have an `mlflow.db` in their working folder would share one that only the first may open.
            address = f"{SQLITE}{database}"
        _prepare_connections()
        with contextlib.nullcontext() if read_only or database is None else creation_lock(database.parent):
            # The registry address is set as well: where it is not, models are looked for in MLflow's global store.
            client = MlflowClient(tracking_uri=address, registry_uri=address)
            client.search_experiments(max_results=1)
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        raise unusable(uri, error) from error
    return client


@contextlib.contextmanager
def creation_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time open a database in `folder`: two that create it at once fail in MLflow's migrations."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _credentials() -> dict[str, str]:
    """Credentials for a server that the settings read from files; MLflow knows the environment only."""
    settings = load_settings()
    secrets = {
        "MLFLOW_TRACKING_PASSWORD": settings.mlflow_tracking_password,
        "MLFLOW_TRACKING_TOKEN": settings.mlflow_tracking_token,
    }
    return {name: secret.get_secret_value() for name, secret in secrets.items() if secret is not None}


def follow_database(database: Path) -> None:
    """Point the artifact locations of a SQLite store that was copied or moved at the folder beside it.

    MLflow stores absolute locations, by which a copy would go on to write into the folder that it was copied from.
    The first to touch the database, so it also says when another process has locked it. Raises `sqlite3.Error`.
    """
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=LOCK_NOTICE)) as connection:
        try:
            connection.execute("SELECT * FROM sqlite_master")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            log.warning("%s is locked by another process; waiting for at most %d s", database, LOCK_SECONDS)
        connection.execute(f"PRAGMA busy_timeout = {1000 * LOCK_SECONDS}")
        try:
            with connection:
                found = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
                places = [(place.removeprefix("file://"), f"mlartifacts/{name}") for name, place in found]
                roots = {place.removesuffix(end) for place, end in places if place[0] == "/" and place.endswith(end)}
                for old in sorted(roots - {f"{database.parent}/"}):
                    _move_locations(connection, old, database)
        except sqlite3.OperationalError as error:
            # An empty database, or one of another version of MLflow, which says so itself.
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise


def _move_locations(connection: sqlite3.Connection, old: str, database: Path) -> None:
    """Replace the folder `old` of artifact locations, which ends with a slash, by that of the database."""
    for table, columns in LOCATIONS.items():
        for column in columns:
            for folder in ("mlartifacts/", "mlruns/"):
                before, after = f"{old}{folder}", f"{database.parent}/{folder}"
                # Behind nothing, or behind `file://`.
                change = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?) IN (1, 8)"
                connection.execute(change, (before, after, before))
    came_along = (database.parent / "mlartifacts").is_dir()
    hint = (
        "" if came_along else f"; what is there already is still missing here: mv {old}mlartifacts {database.parent}/"
    )
    log.warning("%s was copied or moved from %s: its artifacts now lie beside it%s", database, old, hint)


def _prepare_connections() -> None:
    """Have SQLAlchemy connect as `_connect` says, and wait for locks as long as `LOCK_SECONDS` says."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    for name, listener, options in (("do_connect", _connect, {}), ("before_cursor_execute", _wait, {"retval": True})):
        if not event.contains(Engine, name, listener):
            event.listen(Engine, name, listener, **options)


def _wait(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    # MLflow sets its own 20 s in each session.
    return statement.replace("busy_timeout = 20000;", f"busy_timeout = {1000 * LOCK_SECONDS};"), parameters


def _read_only(database: Path) -> str:
    """Return an address that opens the SQLite database read only.

    MLflow would make folders of SQLite's own form of such an address. So a plain one carries a mark (an unusual cache
    size), and is replaced when SQLAlchemy connects.
    """
    return f"{SQLITE}{database}?cached_statements={READER_MARK}"


def _connect(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    if options.get("cached_statements") == READER_MARK:
        arguments[0] = f"file:{quote(arguments[0])}?mode=ro"
        options["uri"] = True


def unusable(uri: str, error: Exception) -> InputError:
    """The store's failure in one line, without its password."""
    reason = one_line(error).replace(uri, without_password(uri))
    allowed = f"name a database such as {SQLITE}mlflow.db or a server's http address"
    return InputError("MLFLOW_TRACKING_URI", f"{without_password(uri)} cannot be used ({reason}); {allowed}")


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store, absolute; `None` for any other store."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).resolve()


def open_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment `name`, created if missing, with artifacts in `mlartifacts/NAME` beside a SQLite database.

    Raises `InputError` where it was deleted in the UI: MLflow keeps its name until it is purged or restored.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = database_file(uri)
        place = None if database is None else str(database.parent / "mlartifacts" / name)
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        what = f"holds a deleted experiment {name}; bring it back: {restore}"
        raise InputError("MLFLOW_TRACKING_URI", what)
    return str(found.experiment_id)


def mark_killed(client: MlflowClient, run: Run, reason: str) -> None:
    """Mark a run whose process is gone as `KILLED`, ended when it was last heard of."""
    last_seen = run.data.tags.get(LAST_SEEN, "")
    client.set_tag(run.info.run_id, "outcome", "killed")
    client.set_tag(run.info.run_id, "outcome.reason", reason)
    client.set_terminated(run.info.run_id, "KILLED", int(last_seen) if last_seen.isdecimal() else None)


def mark_stale_runs(client: MlflowClient, experiment_id: str) -> list[str]:
    """Mark this machine's `RUNNING` runs whose process has died as `KILLED`; returns their ids."""
    marked = []
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        owner = Owner.from_text(run.data.tags.get(OWNER, ""))
        if owner is not None and owner.state() == "dead":
            mark_killed(client, run, "its process ended without an outcome")
            marked.append(str(run.info.run_id))
    return marked


State = Literal["alive", "dead", "unknown"]

SAME_MOMENT = 1.5
"""Seconds: the kernel's boot time has whole ones and may jump by one between two looks."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Identity of one process, unique over reboots and machines."""

    host: str
    """Hash of the machine's name and of the process-id namespace (two containers both have a process 1)."""
    boot: str
    pid: int
    began: float
    """Seconds from the machine's boot to the process's start."""

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Owner | None:
        """The inverse; `None` for anything else, such as a tag of another program."""
        try:
            fields = json.loads(text)
            return cls(str(fields["host"]), str(fields["boot"]), int(fields["pid"]), float(fields["began"]))
        except (ValueError, TypeError, KeyError):
            return None

    def state(self) -> State:
        """Whether that process lives; `unknown` for another machine's, which cannot be seen from here."""
        if self.host != _host():
            return "unknown"
        if self.boot != _boot():
            return "dead"
        import psutil  # which an installation for serving does not have

        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return "dead"
            return "alive" if abs(_began(process) - self.began) < SAME_MOMENT else "dead"
        except psutil.NoSuchProcess:
            return "dead"
        except psutil.Error:
            return "unknown"


def owner_of(pid: int | None = None) -> Owner:
    """Identity of a living process of this machine, of this one by default."""
    import psutil

    process = psutil.Process(pid)
    return Owner(_host(), _boot(), process.pid, round(_began(process), 2))


def _began(process: Any) -> float:
    import psutil

    # Both terms are counted from the same boot time, so a clock that is set does not move the difference.
    return float(process.create_time() - psutil.boot_time())


def _host() -> str:
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = str(uuid.getnode())
    return hashlib.sha256(f"{platform.node()}/{space}".encode()).hexdigest()[:16]


def _boot() -> str:
    """Linux's random id of this boot; elsewhere the boot's minute."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return str(round(psutil.boot_time() / 60))
