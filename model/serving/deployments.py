"""Blue/green deployment state: which of two deployments serves new requests.

Two deployments, `blue` and `green`, stand side by side. New requests go to the active one; a switch changes this
record and nothing else, so a running request keeps its connection and ends where it began.

    store = open_deployments(settings)
    url = store.endpoint(settings.modal_endpoint_url)    # for each new request

The record lives in Redis (key `story:deployments`) when `REDIS_URL` is set, so that apps on several machines see a
switch at once; otherwise in a file, which the apps of one machine share. Reading is cheap enough for each request and
never fails: while the store cannot be read, the last known record stands. Writing reads afresh, and changes nothing
when another writer was faster or the store is gone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import InputError, StoryError
from model.files import write_atomically
from model.settings import Settings, without_password

if TYPE_CHECKING:
    import redis

Deployment = Literal["blue", "green"]
DEPLOYMENTS: tuple[Deployment, Deployment] = ("blue", "green")
_NEITHER: dict[Deployment, str | None] = dict.fromkeys(DEPLOYMENTS)

KEY = "story:deployments"
READ_TIMEOUT = 0.2
"""Seconds to wait for Redis on a read. A new request waits for it, so it is short."""
WRITE_TIMEOUT = 5.0
"""Seconds to wait for Redis in `story deploy`."""
RETRY_AFTER = 2.0
"""Seconds without a read after Redis failed: an outage must not slow down each request."""

log = logging.getLogger(__name__)


class DeploymentError(StoryError):
    """The record cannot be read or written, or does not allow what was asked."""

    exit_code = 1


class StaleDeploymentError(DeploymentError):
    """The record is no longer the one that a change was decided by."""


class DeploymentState(BaseModel):
    """The record. Each change makes a new one, with the next `generation`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    active: Deployment
    """Serves new requests."""
    urls: dict[Deployment, Annotated[str, Field(pattern=r"^https?://\S+$")] | None] = Field(
        default=_NEITHER, min_length=2
    )
    """Address of each deployment that passed its check; None: there is none, or it did not pass."""
    versions: dict[Deployment, Annotated[str, Field(pattern=r"^\S+$")] | None] = Field(default=_NEITHER, min_length=2)
    """Digest of the model folder that each one serves."""
    previous: Deployment | None = None
    """Active before the last switch, if it still runs: the target of `rolled_back`."""
    changed: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """When this record was made, in seconds since 1970 (UTC)."""
    generation: int = 0
    """Counts changes, from 1."""

    @classmethod
    def parse(cls, stored: str | bytes, where: str) -> DeploymentState:
        """Read the stored form. Raises `DeploymentError` that names `where`."""
        try:
            return cls.model_validate_json(stored)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise DeploymentError(
                f"{where} does not hold a deployment record: {place or 'it'}: {first['msg']}"
            ) from None

    @property
    def idle(self) -> Deployment:
        """The deployment that new versions are deployed to."""
        return "green" if self.active == "blue" else "blue"

    @property
    def url(self) -> str | None:
        """Where new requests go."""
        return self.urls[self.active]

    def described(self, verb: str = "go") -> str:
        """Say in one line where new stories go (`verb`: or would go)."""
        return f"new stories {verb} to {self.active} ({(self.versions[self.active] or '')[:12]}) at {self.url}"

    def switched(self, to: Deployment | None = None) -> DeploymentState:
        """Make `to` (None: the idle one) active. Raises `DeploymentError` when it has not passed its check."""
        to = to or self.idle
        if self.urls[to] is None:
            raise DeploymentError(f"{to} has no deployment that passed its check: run `story deploy deploy`")
        if to == self.active:
            return self
        return self._next(active=to, previous=self.active)

    def rolled_back(self) -> DeploymentState:
        """Make active what was before the last switch. Raises `DeploymentError` if that is gone."""
        if self.previous is None:
            raise DeploymentError("there is nothing to roll back to: what ran before the last switch is gone")
        return self.switched(self.previous)

    def updated(self, deployment: Deployment, url: str | None, version: str | None) -> DeploymentState:
        """Record that `deployment` runs at `url`; None for `url` removes it, as before it is replaced."""
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InputError("url", f"must be an http(s) address, got {url!r}")
        version = version if url is not None else None
        replaced = deployment == self.previous and version != self.versions[deployment]
        return self._next(
            urls={**self.urls, deployment: url and url.rstrip("/")},
            versions={**self.versions, deployment: version},
            previous=None if replaced else self.previous,
        )

    def _next(self, **changes: Any) -> DeploymentState:
        return self.model_copy(update={**changes, "changed": time.time(), "generation": self.generation + 1})


Change = Callable[[DeploymentState | None], DeploymentState]
"""Makes the next record from the current one; returning the same one means that nothing changes."""


class DeploymentStore(ABC):
    """Where the record lives. Safe for any number of readers and writers, in threads and in processes."""

    where: str
    """Name of the place, without secrets."""
    known: DeploymentState | None = None
    """What `read` last saw."""
    _failing = False

    @abstractmethod
    def load(self, *, quick: bool = False) -> DeploymentState | None:
        """Return the current record; None: nothing was deployed yet. Raises `DeploymentError`.

        `quick`: for a request that waits; may return the last known record while the store is unavailable.
        """

    @abstractmethod
    def change(self, how: Change) -> DeploymentState:
        """Replace the record by `how` of it, atomically. Raises `DeploymentError`."""

    def read(self) -> DeploymentState | None:
        """Return the record; the last known one while the store cannot be read. Raises nothing.

        With a file this takes less than 0.1 ms; with Redis one GET, of at most 0.2 s, on the calling thread.
        """
        try:
            self.known = self.load(quick=True)
        except DeploymentError as error:
            if not self._failing:
                log.warning("%s; the last known deployment stays active", error)
            self._failing = True
        else:
            self._failing = False
        return self.known

    def endpoint(self, default: str | None) -> str | None:
        """Return the active deployment's address, or `default` where there is none."""
        record = self.read()
        return default if record is None or record.url is None else record.url

    def switch(self, to: Deployment | None = None, *, generation: int | None = None) -> DeploymentState:
        """Make `to` active (None: the idle deployment).

        `generation`: of the record that this was decided by. Raises `DeploymentError`, and `StaleDeploymentError`
        where another change came first.
        """

        def switched(record: DeploymentState) -> DeploymentState:
            if generation not in (None, record.generation):
                raise StaleDeploymentError("the deployments changed meanwhile, and nothing was switched")
            return record.switched(to)

        return self._change_existing(switched, "run `story deploy deploy`")

    def rollback(self) -> DeploymentState:
        """Undo the last switch. Raises `DeploymentError`."""
        return self._change_existing(DeploymentState.rolled_back, "there is nothing to roll back to")

    def _change_existing(self, how: Callable[[DeploymentState], DeploymentState], hint: str) -> DeploymentState:
        def existing(record: DeploymentState | None) -> DeploymentState:
            if record is None:
                raise DeploymentError(f"nothing is deployed yet: {hint}")
            return how(record)

        return self.change(existing)

    def set_deployment(self, deployment: Deployment, url: str | None, version: str | None) -> DeploymentState:
        """Record what runs as `deployment`, None for nothing. The first one ever becomes active."""
        return self.change(
            lambda record: (record or DeploymentState(active=deployment)).updated(deployment, url, version)
        )


class FileDeploymentStore(DeploymentStore):
    """The record in a JSON file that is replaced whole; a lock file beside it serialises writers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)

    def load(self, *, quick: bool = False) -> DeploymentState | None:
        try:
            return DeploymentState.parse(self.path.read_bytes(), self.where)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DeploymentError(f"{self.path} cannot be read: {error.strerror}") from None

    def change(self, how: Change) -> DeploymentState:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A file of its own: the record itself is replaced, and a lock on what is replaced keeps nobody out.
            with open(f"{self.path}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = self.load()
                after = how(before)
                if after is not before:
                    write_atomically(self.path, after.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise DeploymentError(f"{self.path} cannot be written: {error.strerror}") from None
        return after


class RedisDeploymentStore(DeploymentStore):
    """The record under one key of a Redis, changed by compare-and-set."""

    def __init__(self, url: str) -> None:
        """Connect at the first use. Raises `InputError` when `url` is not the address of a Redis."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        def client(timeout: float) -> redis.Redis:
            # One retry: a connection that lay idle may have been closed, and a new one costs little.
            retry = Retry(NoBackoff(), 1)
            return redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=retry)

        self.where = f"{without_password(url)} {KEY}"
        try:
            self._reader, self._writer = client(READ_TIMEOUT), client(WRITE_TIMEOUT)
        except ValueError:
            raise InputError("REDIS_URL", "must start with redis://, rediss:// or unix://") from None
        self._errors = (redis.RedisError, OSError)
        self._retry_at = 0.0

    def load(self, *, quick: bool = False) -> DeploymentState | None:
        if quick and time.monotonic() < self._retry_at:
            return self.known
        try:
            return self._parse((self._reader if quick else self._writer).get(KEY))
        except self._errors as error:
            self._retry_at = time.monotonic() + RETRY_AFTER
            raise DeploymentError(f"{self.where} cannot be read: {error}") from None

    def change(self, how: Change) -> DeploymentState:
        def replace(pipe: Any) -> Any:  # once more where another writer was faster
            before = self._parse(pipe.get(KEY))
            after = how(before)
            pipe.multi()
            if after is not before:
                pipe.set(KEY, after.model_dump_json())
            return after

        try:
            made: Any = self._writer.transaction(replace, KEY, value_from_callable=True)
        except self._errors as error:
            raise DeploymentError(f"{self.where} cannot be written: {error}") from None
        self._retry_at = 0.0
        return DeploymentState.model_validate(made)

    def _parse(self, stored: Any) -> DeploymentState | None:
        return None if stored is None else DeploymentState.parse(stored, self.where)


def state_folder() -> Path:
    """Return the project's folder among the user's state: the same one wherever a command runs."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "write-me-a-story"


def open_deployments(settings: Settings) -> DeploymentStore:
    """Open the store that the settings name. Raises `InputError` for an unusable `REDIS_URL`."""
    if settings.redis_url is not None:
        return RedisDeploymentStore(settings.redis_url.get_secret_value())
    path = settings.story_deployments
    return FileDeploymentStore(Path(path) if path else state_folder() / "deployments.json")
