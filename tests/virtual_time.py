"""An event loop whose time is its own: what waits for a timer is exact, and takes no time at all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while there is work, and jumps to the next timer when there is none.

    For coroutines that wait for timers and for each other, also over sockets of this machine whose two ends are in the
    loop. What comes from threads is waited for during `patience` real seconds before the clock jumps.
    """

    def __init__(self, patience: float = 0.0) -> None:
        super().__init__()
        self._now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def skip(timeout: float | None) -> Any:
            if timeout is None:
                return select(None)
            found = select(min(timeout, patience))
            if not found:
                self._now += timeout
            return found

        selector.select = skip

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._now


def run(main: Coroutine[Any, Any, Result], *, patience: float = 0.0) -> Result:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(patience)) as runner:
        return runner.run(main)
