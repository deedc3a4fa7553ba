"""The two places where the record of colours can live: a file of one machine, or a Redis that several share.

`colours.py` says what the record holds and when it may change; here it is read cheaply and replaced without losing
what another process wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import InputError
from model.serving.deployments.colours import Change, Colours, ColoursError, ColourStore, parse
from model.settings import without_password

if TYPE_CHECKING:
    import redis

KEY = "story:colours"

READ_TIMEOUT = 0.2
"""Seconds that Redis gets to answer a reader. A new story waits for it, so it is short."""
WRITE_TIMEOUT = 5.0
"""Seconds that Redis gets to answer `story deploy`."""
PAUSE = 2.0
"""Seconds in which a Redis that did not answer is not asked again: an outage must not slow down each story."""
ATTEMPTS = 20
"""How often a change is tried again because another writer was faster."""


class FileColours(ColourStore):
    """The record in a JSON file that is replaced whole; a lock beside it keeps two writers apart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        self._seen: tuple[int, int, int] | None = None

    def look(self) -> Colours | None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen = None
            return None
        except OSError as error:
            raise ColoursError(f"{self.path} cannot be read: {error.strerror}") from None
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if seen == self._seen:
            return self.known
        record = self.load()
        self._seen = seen
        return record

    def load(self) -> Colours | None:
        try:
            return parse(self.path.read_bytes(), self.where)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ColoursError(f"{self.path} cannot be read: {error.strerror}") from None

    def change(self, how: Change) -> Colours:
        try:
            with self._locked():
                before = self.load()
                after = how(before)
                if after is not before:
                    self._write(json.dumps(after.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise ColoursError(f"{self.path} cannot be written: {error.strerror}") from None
        return after

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: the record itself is replaced, and a lock on what is replaced keeps nobody out.
        with open(f"{self.path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, text: str) -> None:
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)  # demos may run as another user, and nothing in it is secret
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


class RedisColours(ColourStore):
    """The record under one key of a Redis, changed by compare-and-set."""

    def __init__(self, url: str) -> None:
        """Connect at the first use. Raises `InputError` when `url` is not the address of a Redis."""
        import redis

        self.where = f"{without_password(url)} {KEY}"
        try:
            self._reader = self._client(url, READ_TIMEOUT)
            self._writer = self._client(url, WRITE_TIMEOUT)
        except ValueError:
            raise InputError("REDIS_URL", "must start with redis://, rediss:// or unix://") from None
        self._errors = (redis.RedisError, OSError)
        self._ask_again = 0.0

    @staticmethod
    def _client(url: str, timeout: float) -> redis.Redis:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        # One retry: a connection that lay idle may have been closed, and a new one costs little.
        return redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 1)
        )

    def look(self) -> Colours | None:
        if time.monotonic() < self._ask_again:
            return self.known
        try:
            return self._parse(self._reader.get(KEY))
        except self._errors as error:
            self._ask_again = time.monotonic() + PAUSE
            raise ColoursError(f"{self.where} cannot be read: {error}") from None

    def load(self) -> Colours | None:
        try:
            return self._parse(self._writer.get(KEY))
        except self._errors as error:
            raise ColoursError(f"{self.where} cannot be read: {error}") from None

    def change(self, how: Change) -> Colours:
        import redis

        try:
            for _ in range(ATTEMPTS):
                with self._writer.pipeline() as pipe, contextlib.suppress(redis.WatchError):
                    pipe.watch(KEY)  # type: ignore[no-untyped-call]
                    before = self._parse(pipe.get(KEY))
                    after = how(before)
                    if after is not before:
                        pipe.multi()
                        pipe.set(KEY, json.dumps(after.as_dict()))
                        pipe.execute()
                    self._ask_again = 0.0
                    return after
        except self._errors as error:
            raise ColoursError(f"{self.where} cannot be written: {error}") from None
        raise ColoursError(f"{self.where} cannot be written: others change it all the time")

    def _parse(self, stored: Any) -> Colours | None:
        return None if stored is None else parse(stored, self.where)
