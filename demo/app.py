"""Start the page and stop it cleanly.

The server runs in a thread of its own, with page, HTTP service and backend in one event loop. `serve` is a context
manager for tests and programs with their own main loop; `launch` adds waiting for a signal, for the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

from demo.asgi import compose, open_demo_backend
from demo.experiments_page import open_reader
from demo.page import in_a_loop
from model.serving.backend import Backend
from model.serving.http.address import bound, free_port
from model.serving.logs import configure_logs
from model.serving.options import ServiceOptions
from model.serving.shared_state import SharedState

if TYPE_CHECKING:
    from experiments.dashboard.client import StoreClient
    from model.settings import Settings

GRACE = 3
"""Seconds that open connections get when the server stops; without a limit one idle tab would hold it up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A page that can be opened."""

    url: str
    share_url: str | None
    backend: Backend
    drain: Callable[[float], None]
    """Refuse new stories, of the page and of the API, and wait, so many seconds at most, for running ones."""
    abort: Callable[[], None]
    """Abort them now, during a `drain` too."""


@contextlib.contextmanager
def serve(
    backend: Backend,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    share: bool = False,
    options: ServiceOptions | None = None,
    shared: SharedState | None = None,
    experiments: StoreClient | None = None,
) -> Iterator[Served]:
    """Serve page and service while this context is open; port 0 takes any free one.

    `shared` holds the rate limiter of both; its cache wraps `backend` already. `experiments` adds the page
    Experiments. Raises `InputError` when the address cannot be listened on.
    """
    # Gradio's server would trust every proxy on this machine; `STORY_TRUSTED_PROXIES` names those that count.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    port = port or free_port(host)
    bound(host, port).close()  # so that a taken address is one line here, not five of Gradio's

    parts = compose(backend, replace(options or ServiceOptions(), public=share), shared, experiments)
    manager = parts.service.manager
    loops: list[asyncio.AbstractEventLoop] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        loops.append(asyncio.get_running_loop())
        async with parts.app["lifespan"](app):
            yield

    def drain(seconds: float) -> None:
        asyncio.run_coroutine_threadsafe(manager.drain(seconds), loops[0]).result()

    def abort() -> None:
        loops[0].call_soon_threadsafe(manager.abort)

    def start() -> tuple[Any, str, str]:
        return parts.page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inline=False,
            max_threads=backend.capacity + 8,
            app_kwargs=parts.app | {"lifespan": lifespan},
            **parts.look,
        )

    try:
        _app, url, share_url = in_a_loop(start)
        parts.page.server.config.timeout_graceful_shutdown = GRACE
        yield Served(url, share_url or None, backend, drain, abort)
    finally:
        parts.page.close(verbose=False)


def launch(settings: Settings, *, host: str, port: int, share: bool = False, backend: str = "auto") -> None:
    """Load the model, serve the page, and return after SIGINT or SIGTERM when everything has stopped.

    Running stories finish first, those of the page too, for at most `STORY_DRAIN` seconds; a second signal aborts them.

    Raises `ModelError` when there is no usable model, `InputError` for an unknown backend or a taken port.
    """
    # A handler runs in the main thread, in the middle of whatever that does: a lock that it already holds, such as a
    # `threading.Event`'s, would never be released. `SimpleQueue.put` may be called there.
    signals: SimpleQueue[int] = SimpleQueue()
    draining = False
    abort: list[Callable[[], None]] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signals.put(number)
        if draining:
            for end in abort:
                end()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        configure_logs(settings.story_log)
        options = ServiceOptions.from_settings(settings)
        shared = SharedState.from_settings(settings)
        opened, store_client = open_demo_backend(backend, settings, shared), open_reader(settings)
        where: dict[str, Any] = {"host": host, "port": port, "share": share}
        with serve(opened, **where, options=options, shared=shared, experiments=store_client) as served:
            abort.append(served.abort)
            print(f"Write me a story: {served.url}", flush=True)
            if served.share_url:
                print(f"For everyone, while this runs: {served.share_url}", flush=True)
            elif share:
                print("No share link could be made; the page is here only.", flush=True)
            signals.get()
            print("Closing.", flush=True)
            draining = True
            served.drain(settings.story_drain)
            draining = False
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
