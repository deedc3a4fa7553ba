"""Page and HTTP service as one ASGI application, and `story demo`, which serves it until a signal ends it.

`launch` runs it in a server of its own, which drains; any other ASGI server can:

    uvicorn --factory demo.asgi:create_app
"""

import contextlib
import logging
import secrets
import warnings
from collections.abc import AsyncIterator
from importlib.util import find_spec

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from demo import document, theme
from demo.arena_page import PATH as ARENA
from demo.experiments_page import PATH, open_reader
from demo.page import build, in_a_loop
from demo.routing import RoutingBackend, UserCookieMiddleware, open_variants
from experiments.dashboard.client import StoreClient
from experiments.registry.resolve import open_registry
from model.errors import MissingExtraError
from model.serving.backend import Backend
from model.serving.http.app import ServiceRoute, SharedState, create_service
from model.serving.http.middleware import outer_middleware
from model.serving.http.server import DrainingServer, bound, url_of
from model.serving.logs import configure_logs
from model.serving.remote import open_backend
from model.settings import ServiceOptions, Settings, load_settings


def open_demo_backend(kind: str, settings: Settings, shared: SharedState) -> Backend:
    """Open the backend `kind` (`auto`, `local` or `modal`), routed and cached as the settings say."""
    return open_variants(lambda: open_backend(kind, settings, open_registry), settings, over=shared.with_cache)


def create_app(settings: Settings | None = None, kind: str = "auto", *, public: bool = False) -> FastAPI:
    """Build the application as `settings` say, by default the environment's, over the backend `kind`.

    `kind` is `auto`, `local` or `modal`; `public`: a share link leads here.
    Raises `InputError`, `ModelError`, and `MissingExtraError` for `mcp` without its package.
    """
    settings = settings or load_settings()
    shared = SharedState.from_settings(settings)
    backend = open_demo_backend(kind, settings, shared)
    return compose(backend, ServiceOptions(settings=settings, public=public), shared, open_reader(settings))


def compose(
    backend: Backend,
    options: ServiceOptions | None = None,
    shared: SharedState | None = None,
    experiments: StoreClient | None = None,
) -> FastAPI:
    """Put page and service over `backend`, which runs while the application's lifespan does.

    `shared` holds the rate limiter of page and service; its cache wraps `backend` already. `experiments` adds the page
    Experiments. The service is in `app.state.service`. Raises `MissingExtraError` for `mcp` without its package.
    """
    options = options or ServiceOptions()
    settings = options.settings
    if settings.story_mcp and find_spec("mcp") is None:
        raise MissingExtraError("STORY_MCP", "mcp")
    service = create_service(backend, options, shared)
    users = []
    if isinstance(backend, RoutingBackend):
        service.meter.registry.register(backend)
        users.append(Middleware(UserCookieMiddleware, root_path=settings.story_root_path))

    absent = {PATH} if experiments is None else set()
    if not (isinstance(backend, RoutingBackend) and backend.contestants):
        absent.add(ARENA)
    paths = [path for path in document.PAGES if path not in absent]

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running(), experiments.running() if experiments else contextlib.nullcontext():
            yield

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        routes=[ServiceRoute(service), *document.routes()],  # before the page, which answers every other address
        middleware=[*outer_middleware(options), Middleware(document.DocumentMiddleware, paths), *users],
    )
    app.state.service = service

    def mount() -> None:
        # With more than one page Gradio says that it turns SSR off, which is off.
        warnings.filterwarnings("ignore", "SSR mode is not supported", UserWarning)
        gr.mount_gradio_app(
            app,
            build(service.manager, experiments),
            path="/",
            root_path=settings.story_root_path,
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=settings.story_mcp,
            theme=theme.theme(),
        )

    with warnings.catch_warnings():
        in_a_loop(mount)
    return app


log = logging.getLogger(__name__)


def launch(settings: Settings, *, share: bool = False, backend: str = "auto") -> None:
    """Load the model, serve the page, and return after SIGINT or SIGTERM when everything has stopped.

    Running stories finish first, for at most `STORY_DRAIN` seconds; a second signal aborts them.

    Raises `ModelError` when there is no usable model, `InputError` for an unknown backend or a taken port.
    """
    configure_logs(settings.story_log)
    with bound(settings.host, settings.port) as listener:
        app = create_app(settings, backend, public=share)

        def ready() -> None:
            print(f"Write me a story: {url_of(listener, settings.host)}/", flush=True)
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
