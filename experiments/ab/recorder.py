"""Record events in the database without delaying any request.

`Recorder.add` only queues an event; a background thread (`model.outbox`) writes batches. While the database is down,
locked or full, up to `LIMIT` events are kept and retried; what does not fit is counted as lost. The start and the end
of an outage are logged once each. SQLAlchemy (0.7 s) is imported by the background thread only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.ab.events import Event, hashed
from model.outbox import Outbox
from model.settings import without_password

if TYPE_CHECKING:
    import sqlalchemy as sa


LIMIT = 10_000
"""Events queued at most: about 5 MB, and minutes of an outage of a busy demo."""
PERIOD = 1.0
"""Seconds between two batches."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the first retry after a failure, and before any; the pause doubles in between."""
CLOSE_TIMEOUT = 5.0
"""Seconds for the last batch at shutdown."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of this process's events by what became of them."""

    written: int
    waiting: int
    lost: int


class Recorder:
    """Writes events to the database at `url` while `running` is entered.

    `salt` goes into the hash of a user's id; `keeps_prompts` says whether prompts may be stored; `period`, `pause` (the
    longest) and `limit` are for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        salt: str = "",
        keeps_prompts: bool = False,
        period: float = PERIOD,
        pause: float = LONGEST_PAUSE,
        limit: int = LIMIT,
    ) -> None:
        self.url = url
        self.keeps_prompts = keeps_prompts
        self._salt = salt
        self._options: dict[str, Any] = {
            "period": period,
            "limit": limit,
            "first_pause": min(FIRST_PAUSE, pause),
            "longest_pause": pause,
        }
        self._outbox: Outbox[Event] | None = None
        self._engine: sa.Engine | None = None
        self._written = self._lost = 0
        self._loss_is_logged = False

    def hashed(self, user: str) -> str:
        """Return what is stored instead of a user's id."""
        return hashed(user, self._salt)

    def add(self, event: Event) -> None:
        """Queue an event and return at once, whatever the state of the database."""
        if self._outbox is None:
            self._lost += 1
            return
        self._outbox.add([event])
        if not self._loss_is_logged and self._outbox.state()[1]:
            self._loss_is_logged = True
            log.warning("the database has been down for long: the oldest unstored events are being lost")

    def tally(self) -> Tally:
        waiting, dropped = (0, 0) if self._outbox is None else self._outbox.state()
        return Tally(self._written, waiting, self._lost + dropped)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Write while this context is open; what is left at its end gets `CLOSE_TIMEOUT` seconds."""
        self._outbox = Outbox(
            self._send,
            on_failure=self._on_failure,
            on_recovery=lambda: log.warning("events are being stored again"),
            **self._options,
        )
        try:
            yield
        finally:
            outbox, self._outbox = self._outbox, None
            left = outbox.close(CLOSE_TIMEOUT)
            self._disconnect()
            self._lost += len(left.items) + left.dropped
            if self._lost:
                why = f" ({left.error})" if left.error else ""
                log.warning("%d events were not stored%s", self._lost, why)

    def _send(self, events: list[Event]) -> None:
        from experiments.ab.store import connect, migrate

        try:
            if self._engine is None:
                self._engine = connect(self.url, writes=True)
                migrate(self._engine)
            self._insert(self._engine, events)
        except Exception:
            # The database may come back as another, empty one: connect and migrate again.
            self._disconnect()
            raise

    def _insert(self, engine: sa.Engine, events: list[Event]) -> None:
        from sqlalchemy.exc import DataError, IntegrityError

        from experiments.ab.store import insert_events

        try:
            insert_events(engine, events)
            self._written += len(events)
        except (DataError, IntegrityError) as error:
            if len(events) > 1:  # one bad event must not keep the others out
                for event in events:
                    self._insert(engine, [event])
            else:
                self._lost += 1
                log.warning("an event cannot be stored (%s)", type(error).__name__)

    def _disconnect(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    def _on_failure(self, error: str) -> None:
        shown = error.replace(self.url, without_password(self.url)).partition(" [SQL:")[0]
        log.warning("events cannot be stored for now (%s); they are kept and retried", shown)
