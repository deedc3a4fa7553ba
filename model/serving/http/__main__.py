"""`python -m model.serving.http`: the service alone, as it runs in a container and as a deployment on this machine."""

import os
import sys
from typing import Annotated, Literal

import typer
from typer import Option

from model.errors import StoryError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    host: Annotated[str | None, Option(help="Address to listen on; default: HOST.")] = None,
    port: Annotated[int | None, Option(help="Port, 0 for any free one; default: PORT.")] = None,
    model: Annotated[str | None, Option(help="Model folder or reference; default: STORY_MODEL.")] = None,
    precision: Annotated[Literal["int8", "fp32"] | None, Option(help="Decode graph; default: STORY_PRECISION.")] = None,
    threads: Annotated[int | None, Option(help="Threads of it; default: STORY_THREADS.")] = None,
    slots: Annotated[int | None, Option(help="Stories generated at once; default: STORY_SLOTS.")] = None,
    queue: Annotated[int | None, Option(help="Requests that may wait; default: STORY_QUEUE.")] = None,
    drain: Annotated[int | None, Option(help="Seconds to finish on SIGTERM; default: STORY_DRAIN.")] = None,
    name: Annotated[str, Option(help="Name of this deployment, say `blue`, for x-story-backend.")] = "",
) -> None:
    """Serve stories over HTTP until SIGTERM or SIGINT; exit code 0 when it has drained."""
    # ONNX Runtime reports usage to its maker unless that is disabled before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from model.serving.http.server import bound, url_of
    from model.settings import ServiceOptions, load_settings

    settings = load_settings(
        host=host,
        port=port,
        story_model=model,
        story_precision=precision,
        story_threads=threads,
        story_slots=slots,
        story_queue=queue,
        story_drain=drain,
    )
    options = ServiceOptions(settings=settings, name=name)
    with bound(settings.host, settings.port) as listener:
        # Errors in the options have been reported by now; what follows takes seconds to load.
        from model.serving.following import open_local
        from model.serving.http.app import SharedState, create_service
        from model.serving.http.server import DrainingServer
        from model.serving.logs import configure_logs

        configure_logs(settings.story_log)
        label = f"Story service {name}".rstrip()
        url = url_of(listener, settings.host)
        shared = SharedState.from_settings(settings)
        server = DrainingServer(
            create_service(shared.with_cache(open_local(settings)), options, shared),
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
