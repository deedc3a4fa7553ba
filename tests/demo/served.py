"""The app as `story demo` serves it, in a thread: the same application, server and drain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from demo.asgi import compose
from experiments.dashboard.client import StoreClient
from model.serving.backend import Backend
from model.serving.http.app import SharedState
from model.serving.http.server import DrainingServer, bound, url_of
from model.serving.session import GenerationManager
from model.settings import ServiceOptions


@dataclass(frozen=True)
class Served:
    """A page that can be opened."""

    url: str
    backend: Backend
    manager: GenerationManager
    loop: asyncio.AbstractEventLoop

    def drain(self, seconds: float) -> None:
        """Drain, in this thread."""
        asyncio.run_coroutine_threadsafe(self.manager.drain(seconds), self.loop).result()

    def abort(self) -> None:
        """Abort what a drain waits for."""
        self.loop.call_soon_threadsafe(self.manager.abort)


@contextlib.contextmanager
def serve(
    backend: Backend,
    *,
    host: str = "127.0.0.1",
    options: ServiceOptions | None = None,
    shared: SharedState | None = None,
    experiments: StoreClient | None = None,
) -> Iterator[Served]:
    """Serve page and service while this context is open, at any free port."""
    app = compose(backend, options, shared, experiments)
    loops: list[asyncio.AbstractEventLoop] = []
    reachable = threading.Event()

    def ready() -> None:
        loops.append(asyncio.get_running_loop())
        reachable.set()

    with bound(host, 0) as listener:
        server = DrainingServer(app.state.service, ready, app=app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert reachable.wait(60), "the app did not start"
            yield Served(f"{url_of(listener, host)}/", backend, app.state.service.manager, loops[0])
        finally:
            for _ in range(2):  # as a signal does: drain, and at the second one no longer wait for stories
                server.handle_exit(signal.SIGTERM, None)
            thread.join(30)
            assert not thread.is_alive(), "the app did not end"
            assert not server.lifespan.shutdown_failed
