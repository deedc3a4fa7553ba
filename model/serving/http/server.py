"""A server that drains before it stops.

On SIGTERM or SIGINT it keeps listening: new requests are refused, the health route says `draining`, and running
requests finish, for a bounded time. A second signal ends them at once. Then it closes.
"""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from model.errors import InputError

if TYPE_CHECKING:
    from model.serving.http.app import Service


def bound(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host` and `port`, 0 for any free one; it refuses connections until it is served.

    Raises `InputError` when the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sends small messages at once (TCP_NODELAY); without, the end of a response waited
    # for the client's acknowledgement, and first tokens on kept connections came after 56 ms instead of 25.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
    except socket.gaierror:
        made.close()
        raise InputError("host", f"must be an address of this machine, got {host!r}") from None
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError("port", f"{port} on {host} cannot be used: {reason}") from None
    made.setblocking(False)
    return made


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of `host` that nothing listens on now. Raises `InputError` for another machine's address."""
    with bound(host, 0) as probe:
        port: int = probe.getsockname()[1]
        return port


def url_of(listener: socket.socket, host: str) -> str:
    """Return the URL of `listener`."""
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


GRACE = 2
"""Seconds for open connections to receive their last bytes when all requests have ended."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients and proxies keep theirs (nginx 60, httpx 5, ours 30),
or a request meets a connection that is being closed."""


class DrainingServer(uvicorn.Server):
    """Serves `service`, or an application `app` that carries it.

    `ready` is called once it can be reached, `closing` when it begins to drain.
    """

    def __init__(
        self,
        service: "Service",
        ready: Callable[[], None] = lambda: None,
        *,
        closing: Callable[[], None] = lambda: None,
        app: ASGIApp | None = None,
    ) -> None:
        config = uvicorn.Config(
            app or service,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # `STORY_TRUSTED_PROXIES` says whose headers count
            timeout_graceful_shutdown=2 * GRACE,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self._service = service
        self._ready = ready
        self._closing = closing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and remember the loop that a signal has to reach."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, and after `GRACE` disconnect those who stay: each tab of the page keeps a stream open."""
        asyncio.get_running_loop().call_later(GRACE, self._disconnect)
        await super().shutdown(sockets)

    def _disconnect(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.close()  # uvicorn itself would cancel its task, with a traceback in the log

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain, or on a second signal, or while still starting, end at once.

        uvicorn would note the signal and raise it again at the end; a drained service ends with exit code 0.
        """
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._finish())
            self._closing()  # the caller's, which may fail
        else:
            self._service.manager.abort()

    async def _finish(self) -> None:
        manager = self._service.manager
        await manager.drain(manager.options.settings.story_drain)
        await self._service.sockets.close()  # a client that polls would hold its connection for 25 s
        self.should_exit = True
