"""Stories and verdicts on their way to the database, without any reader waiting for it.

Whoever tells stories only puts events down here; a thread of its own (`model.outbox`) writes them in
batches. While the database is gone, locked or full they are kept, up to `LIMIT`, and tried again; what did not fit
any more is counted. An outage is logged once, its end too.
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
"""Events that wait at most: some 5 MB, and minutes of an outage of the busiest demo."""
PERIOD = 1.0
"""Seconds between two batches."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the next try after a failure; doubled from one to the other."""
LAST_CALL = 5.0
"""Seconds that the last batch gets when the demo ends."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the events of this process."""

    written: int
    waiting: int
    lost: int


class Recorder:
    """Writes events to the database at `address` between entering and leaving `running`.

    `salt` goes into the hash of a visitor's id, `keeps_prompts` says whether prompts may be stored; `period`, `pause`
    (the longest) and `limit` are for tests.
    """

    def __init__(
        self,
        address: str,
        *,
        salt: str = "",
        keeps_prompts: bool = False,
        period: float = PERIOD,
        pause: float = LONGEST_PAUSE,
        limit: int = LIMIT,
    ) -> None:
        self.address = address
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
        self._told_of_loss = False

    def hashed(self, visitor: str) -> str:
        """What is stored instead of a visitor's id."""
        return hashed(visitor, self._salt)

    def add(self, event: Event) -> None:
        """Put an event down; returns at once, whatever the database does."""
        if self._outbox is None:
            self._lost += 1
            return
        self._outbox.add([event])
        if not self._told_of_loss and self._outbox.state()[1]:
            self._told_of_loss = True
            log.warning("the database has been gone for long: the oldest unstored events are being lost")

    def tally(self) -> Tally:
        """What became of the events so far."""
        waiting, dropped = (0, 0) if self._outbox is None else self._outbox.state()
        return Tally(self._written, waiting, self._lost + dropped)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Write while this context is open; what is left at its end gets `LAST_CALL` seconds."""
        self._outbox = Outbox(
            self._send,
            on_failure=self._on_failure,
            on_recovery=lambda: log.warning("stories and verdicts are being stored again"),
            **self._options,
        )
        try:
            yield
        finally:
            outbox, self._outbox = self._outbox, None
            left = outbox.close(LAST_CALL)
            self._let_go()
            self._lost += len(left.items) + left.dropped
            if self._lost:
                why = f" ({left.error})" if left.error else ""
                log.warning("%d events of stories and verdicts were not stored%s", self._lost, why)

    def _send(self, events: list[Event]) -> None:
        from sqlalchemy.exc import DataError, IntegrityError  # 0.7 s, in this thread

        from experiments.ab.database import connect, migrate, store

        try:
            if self._engine is None:
                self._engine = connect(self.address, writes=True)
                migrate(self._engine)
            store(self._engine, events)
        except (DataError, IntegrityError):
            self._send_singly(self._engine, events)
        except Exception:
            # It may come back as another one, and an empty one at that.
            self._let_go()
            raise
        else:
            self._written += len(events)

    def _let_go(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    def _send_singly(self, engine: Any, events: list[Event]) -> None:
        """One event that the database cannot hold must not keep the others from it."""
        from sqlalchemy.exc import DataError, IntegrityError

        from experiments.ab.database import store

        for event in events:
            try:
                store(engine, [event])
                self._written += 1
            except (DataError, IntegrityError) as error:
                self._lost += 1
                log.warning("an event cannot be stored (%s)", type(error).__name__)

    def _on_failure(self, error: str) -> None:
        shown = error.replace(self.address, without_password(self.address)).partition(" [SQL:")[0]
        log.warning(
            "stories and verdicts cannot be stored for now (%s); they are kept and tried again", shown
        )
