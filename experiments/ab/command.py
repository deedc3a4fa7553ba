"""The verb `story ab`: its options, and nothing that takes time to load.

`story.py` imports this for every verb, so that `story --help` can list them.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer


def ab(
    test: Annotated[str | None, typer.Option(help="Name of the test. Default: the newest one.")] = None,
    metric: Annotated[
        Literal["like", "finished", "stopped", "failed"], typer.Option(help="Figure that decides.")
    ] = "like",
    since: Annotated[
        str | None, typer.Option(help="Only stories from then on: 2026-11-03, 2026-11-03T08:00, 12h, 7d.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Chance of a wrong decision, over all looks together.")] = 0.05,
    track: Annotated[bool, typer.Option(help="Log this look to MLflow.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a machine instead of text.")
    ] = False,
) -> None:
    """Compare versions on what readers did: exit code 0 if one is better than the first, 1 if worse, 3 undecided."""
    from rich.console import Console

    from experiments.ab.address import address_of
    from experiments.ab.run import log, look
    from experiments.ab.shown import print_report
    from experiments.ab.since import parse_since
    from model.settings import load_settings

    settings = load_settings()
    start = None if since is None else parse_since(since)
    report = look(address_of(settings), test, metric=metric, alpha=alpha, since=start)
    logged = log(settings.mlflow_tracking_uri, report) if track else {}
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "logged": logged}, ensure_ascii=False, indent=2))
    else:
        print_report(report, Console())
        if "failed" in logged:
            typer.echo(f"not logged: {logged['failed']}", err=True)
    raise typer.Exit(report.exit_code)
