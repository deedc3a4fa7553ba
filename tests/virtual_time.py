"""An event loop whose time is its own: what waits for a timer is exact, and takes no time at all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while there is work, and jumps to the next timer when there is none.

    For coroutines that wait for timers and for each other. Answers of threads and sockets come at any virtual time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def skip(timeout: float | None) -> Any:
            if timeout is None:
                return select(None)
            self._now += timeout
            return select(0)

        selector.select = skip

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._now


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
