"""The page and the service as one ASGI application, for hosts that bring a server of their own.

    uvicorn --factory demo.asgi:create_app

What is served is what `demo.app` serves: the same page, look and routes over the same backend. Only who listens,
and on what, is the host's affair here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from demo import theme
from demo.experiments_page import open_reader
from demo.page import build, in_a_loop
from demo.routing import noted
from demo.routing.arms import divided
from model.serving.http.app import ServiceRoute, create_service
from model.serving.http.options import ServiceOptions
from model.serving.http.secured import SecurityHeadersMiddleware
from model.serving.remote import open_backend
from model.serving.shared_state import SharedState
from model.settings import load_settings

if TYPE_CHECKING:
    from experiments.dashboard.reader import StoreReader
    from model.serving.backend import Backend


def create_app(
    backend: Backend | None = None,
    options: ServiceOptions | None = None,
    shared: SharedState | None = None,
    experiments: StoreReader | None = None,
) -> FastAPI:
    """The application over `backend`, which runs while the application does.

    Without a backend the environment's settings choose one, as `story demo` does. Raises `InputError` and
    `ModelError`.
    """
    if backend is None:
        settings = load_settings()
        shared = shared or SharedState.from_settings(settings)
        backend = divided(lambda: open_backend("auto", settings), settings, over=shared.with_cache)
        options = options or ServiceOptions.from_settings(settings)
        experiments = experiments or open_reader(settings)
    service = create_service(backend, options, shared)
    noted.add_figures(service, backend)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running(), experiments.running() if experiments else contextlib.nullcontext():
            yield

    app = FastAPI(
        lifespan=lifespan,
        routes=[ServiceRoute(service)],  # before the page, which answers for every other address
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[Middleware(SecurityHeadersMiddleware), *noted.middleware(backend)],
    )
    page = build(service.manager.backend, service.shared.limiter, experiments)

    def mount() -> None:
        # With more than one page Gradio says that it turns SSR off, which is off.
        warnings.filterwarnings("ignore", "SSR mode is not supported", UserWarning)
        gr.mount_gradio_app(
            app,
            page,
            path="/",
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            favicon_path=str(theme.ASSETS / "favicon.svg"),
            theme=theme.theme(),
            head=theme.head(),
        )

    with warnings.catch_warnings():
        in_a_loop(mount)
    return app
