"""The verb `story benchmark`. `story --help` imports this file, so it loads nothing heavy."""

from __future__ import annotations

from typing import Annotated

import typer

from experiments.common.cli_options import REFERENCE, Json, MarkdownFile, ThresholdsFile, Track


def benchmark(
    target: Annotated[
        str | None,
        typer.Option(
            help="local, an http(s) address, or what --model takes. Default: the challenger of the store, else local."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help=f"{REFERENCE} Default: STORY_MODEL, else pretrained.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another target to compare with, asked in turn in the same run.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests of each phase. Default: 30, or as many as --duration takes.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests open at once; the stress phase goes to four times that.")
    ] = 8,
    rate: Annotated[float, typer.Option(help="Requests a second in the open loop, at random times.")] = 2.0,
    duration: Annotated[float | None, typer.Option(help="Seconds after which a phase starts no more requests.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest story, in tokens.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed asks the same at the same times.")] = 0,
    phases: Annotated[
        str | None, typer.Option(help="Of cold,single,concurrent,stress,open,compare. Default: all that apply.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 60.0,
    ttft_limit: Annotated[float, typer.Option(help="Goodput: seconds within which the first token must come.")] = 1.0,
    itl_limit: Annotated[
        float, typer.Option(help="Goodput: seconds that a token may take on average after that.")
    ] = 0.1,
    api_key: Annotated[
        str | None, typer.Option(help="Sent as a bearer token to targets that are addresses. Default: OPENAI_API_KEY.")
    ] = None,
    thresholds: ThresholdsFile = None,
    markdown: MarkdownFile = None,
    track: Track = True,
    as_json: Json = False,
) -> None:
    """Measure latency and load, alone and among many; exit code 1 if a threshold fails."""
    from rich.console import Console

    from experiments.benchmark.plan import Plan
    from experiments.benchmark.run import benchmark as measure
    from experiments.benchmark.run import phases_of, publish
    from experiments.registry.resolve import challenger_reference
    from model.errors import InputError
    from model.settings import load_settings

    settings = load_settings(openai_api_key=api_key)
    plan = Plan(
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        duration=duration,
        max_tokens=max_tokens,
        seed=seed,
        phases=phases_of(phases, against=against is not None),
        timeout=timeout,
        ttft_limit=ttft_limit,
        itl_limit=itl_limit,
    )
    if model is not None:
        if target not in (None, "local"):
            raise InputError("model", f"goes with --target local only, got --target {target}")
        target = model
    target = target or challenger_reference(settings) or "local"
    terminal = Console(stderr=True)
    console = terminal if terminal.is_terminal else None
    report, samples = measure(target, plan, settings, against=against, thresholds=thresholds, console=console)
    uri = settings.mlflow_tracking_uri if track else None
    publish(report, samples, markdown=markdown, track=uri, as_json=as_json)
    raise typer.Exit(0 if report.passed else 1)
