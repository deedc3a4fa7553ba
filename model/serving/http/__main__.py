"""`python -m model.serving.http`: the service alone, as it runs in a container and as a deployment on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from model.errors import StoryError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: HOST, else 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for any free one. Default: PORT, else 7860.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder. Default: STORY_MODEL, else the one that ships.")
    ] = None,
    precision: Annotated[
        Literal["int8", "fp32"] | None,
        typer.Option(help="Decode graph. Default: STORY_PRECISION, else int8."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the decode graph. Default: STORY_THREADS, else 1.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Stories generated at once. Default: STORY_SLOTS, else 16.")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(help="Requests that may wait for a slot. Default: STORY_QUEUE, else 64.")
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(help="Seconds for running stories to finish on SIGTERM. Default: STORY_DRAIN, else 30."),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Name of this deployment, say `blue`; sent in x-story-backend.")
    ] = "",
) -> None:
    """Serve stories over HTTP until SIGTERM or SIGINT; exit code 0 when it has drained."""
    # ONNX Runtime reports usage to its maker unless it is told not to before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from model.serving.http.address import bound, url_of
    from model.serving.http.options import ServiceOptions
    from model.settings import load_settings

    settings = load_settings(
        host=host,
        port=port,
        story_model=None if model is None else str(model),
        story_precision=precision,
        story_threads=threads,
        story_slots=slots,
        story_queue=queue,
        story_drain=drain,
    )
    options = ServiceOptions.from_settings(settings, name=name)
    with bound(settings.host, settings.port) as listener:
        # Errors in the options have been reported by now; what follows takes seconds to load.
        from model.serving.backend import LocalBackend
        from model.serving.http.app import create_service
        from model.serving.http.server import DrainingServer
        from model.serving.logs import configure_logs
        from model.serving.shared_state import SharedState

        configure_logs(settings.story_log)
        label = f"Story service {name}".rstrip()
        url = url_of(listener, settings.host)
        shared = SharedState.from_settings(settings)
        server = DrainingServer(
            create_service(shared.with_cache(LocalBackend.load(settings)), options, shared),
            ready=lambda: print(f"{label}: {url}", flush=True),
        )
        server.run(sockets=[listener])


def main() -> None:
    """Run it; an error is one line on stderr."""
    try:
        app(prog_name="python -m model.serving.http")
    except StoryError as error:
        print(f"story service: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
