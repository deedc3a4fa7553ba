"""`story demo`: serve page and HTTP service until a signal ends them, and make a share link."""

from __future__ import annotations

import logging
import secrets

from demo.asgi import create_app
from model.serving.http.address import bound, url_of
from model.serving.http.server import DrainingServer
from model.serving.logs import configure_logs
from model.settings import Settings

log = logging.getLogger(__name__)


def launch(settings: Settings, *, host: str, port: int, share: bool = False, backend: str = "auto") -> None:
    """Load the model, serve the page, and return after SIGINT or SIGTERM when everything has stopped.

    Running stories finish first, for at most `STORY_DRAIN` seconds; a second signal aborts them.

    Raises `ModelError` when there is no usable model, `InputError` for an unknown backend or a taken port.
    """
    configure_logs(settings.story_log)
    with bound(host, port) as listener:
        app = create_app(settings, backend, public=share)

        def ready() -> None:
            print(f"Write me a story: {url_of(listener, host)}/", flush=True)
            if share:
                print(_share(*listener.getsockname()[:2]), flush=True)

        def closing() -> None:
            print("Closing: running stories finish first; a second signal ends them.", flush=True)

        DrainingServer(app.state.service, ready, closing=closing, app=app).run(sockets=[listener])


def _share(host: str, port: int) -> str:
    """Make a share link of Gradio and return the line that says so. It is closed when the process ends."""
    from gradio.networking import setup_tunnel

    try:
        url = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # no network, no permission, another platform: Gradio raises what it meets
        log.warning("no share link: %s", error)
        return "No share link could be made; the page is here only."
    return f"For everyone, while this runs: {url}"
