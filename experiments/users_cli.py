"""The verbs about what users chose: the A/B test and the arena."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import typer

from experiments.cli import Json, Track
from model.errors import InputError
from model.files import print_json


def parse_since(text: str, now: datetime | None = None) -> float:
    """Return the time that `text` names, in seconds since 1970; UTC unless it has a zone. Raises `InputError`."""
    if ago := re.fullmatch(r"(\d{1,5})([mhdw])", text):
        units = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
        span = timedelta(**{units[ago[2]]: int(ago[1])})
        return ((now or datetime.now(UTC)) - span).timestamp()
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        allowed = "must be a day (2026-11-03), a time (2026-11-03T08:00) or how long ago (90m, 12h, 7d, 2w)"
        raise InputError("since", f"{allowed}, got {text[:60]!r}") from None


def ab(
    test: Annotated[str | None, typer.Option(help="Name of the test. Default: the newest one.")] = None,
    metric: Annotated[
        Literal["like", "finished", "stopped", "failed"], typer.Option(help="Metric that decides.")
    ] = "like",
    since: Annotated[
        str | None, typer.Option(help="Only stories since: 2026-11-03, 2026-11-03T08:00, 12h, 7d.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Probability of a wrong decision, over all looks together.")] = 0.05,
    track: Track = True,
    as_json: Json = False,
) -> None:
    """Compare versions by what users did: exit code 0 if one is better than the first, 1 if worse, 3 undecided."""
    from rich.console import Console

    from experiments.ab.events import database_url
    from experiments.ab.report import log, look, markdown, print_report
    from model.settings import load_settings

    settings = load_settings()
    start = None if since is None else parse_since(since)
    report = look(database_url(settings), test, metric=metric, alpha=alpha, since=start)
    logged = log(settings.mlflow_tracking_uri, report, markdown(report)) if track else {}
    if as_json:
        print_json({**report.as_dict(), "logged": logged})
    else:
        print_report(report, Console())
        if "failed" in logged:
            typer.echo(f"not logged: {logged['failed']}", err=True)
    raise typer.Exit(report.exit_code)


def arena(
    since: Annotated[str | None, typer.Option(help="Only votes since: 2026-11-03, 2026-11-03T08:00, 12h, 7d.")] = None,
    track: Track = True,
    as_json: Json = False,
) -> None:
    """Score the contestants of the arena by users' blind votes: exit code 0 if one is better, 3 if undecided.

    Logged votes between two versions with the same settings are evidence: the gate can ask for `arena_win_rate`.
    """
    from rich.console import Console

    from experiments.ab.events import database_url
    from experiments.arena.report import log, look, print_report
    from model.settings import load_settings

    settings = load_settings()
    report = look(database_url(settings), None if since is None else parse_since(since))
    logged = log(settings.mlflow_tracking_uri, report) if track else {}
    if as_json:
        print_json({**report.as_dict(), "logged": logged})
    else:
        print_report(report, Console())
        if "failed" in logged:
            typer.echo(f"not logged: {logged['failed']}", err=True)
    raise typer.Exit(report.exit_code)
