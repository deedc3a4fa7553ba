"""The verbs `story gate` and `rollback`. `story --help` imports this file, so it loads nothing heavy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.common.cli_options import REFERENCE, Json, MarkdownFile, ThresholdsFile, Track

if TYPE_CHECKING:
    from experiments.gate.promotion import Move

Version = Annotated[str, typer.Option(help="Number, alias or digest of a registered version.")]
Apply = Annotated[bool, typer.Option("--yes", help="Move the alias; without it, only show what would move.")]


def gate(
    version: Version = "challenger",
    model: Annotated[
        str | None, typer.Option(help=f"Judge this model, registered or not, instead of a version. {REFERENCE}")
    ] = None,
    against_file: Annotated[
        Path | None, typer.Option(help="Compare with a champion's losses in a file (--save-champion).")
    ] = None,
    save_champion: Annotated[
        Path | None, typer.Option(help="Judge nothing: write the artifact's losses to this file.")
    ] = None,
    thresholds: ThresholdsFile = None,
    markdown: MarkdownFile = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the decision as JUnit XML here.")] = None,
    track: Track = True,
    as_json: Json = False,
) -> None:
    """Judge a version by its evidence: exit code 0 for pass, 1 for fail, 3 for undecided.

    Only a decision that is logged to MLflow can promote a version.
    """
    from rich.console import Console

    from experiments.common.thresholds import THRESHOLDS, load_thresholds
    from experiments.gate import render
    from experiments.gate.run import run_gate, save_losses
    from experiments.registry.resolve import resolve_model
    from model.architecture.folder import ModelFolder
    from model.settings import load_settings

    settings = load_settings()
    uri = settings.mlflow_tracking_uri
    digest = None if model is None else ModelFolder.open(resolve_model(model, settings).path).digest
    if save_champion is not None:
        save_losses(uri, save_champion, version=version, digest=digest)
        return
    bounds = load_thresholds(thresholds or THRESHOLDS)
    decision = run_gate(uri, bounds, version=version, digest=digest, against_file=against_file, track=track)
    if markdown is not None:
        markdown.write_text(render.markdown(decision), encoding="utf-8")
    if junit is not None:
        junit.write_text(render.junit(decision), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(decision.as_dict(), ensure_ascii=False, indent=2))
    else:
        render.print_decision(decision, Console())
    raise typer.Exit(decision.exit_code)


def rollback(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")] = False,
    as_json: Json = False,
) -> None:
    """Give the alias champion back to the version that had it before."""
    from experiments.gate.promotion import rollback as move_back
    from model.settings import load_settings

    move = move_back(load_settings().mlflow_tracking_uri, apply=not dry_run)
    print_move(move, "would be champion again" if dry_run else "is champion again", as_json=as_json)


def print_move(move: Move, what: str, *, as_json: bool) -> None:
    """Print which version got the alias `champion`, or would get it."""
    if as_json:
        typer.echo(json.dumps(asdict(move), indent=2))
        return
    before = move.champion_before
    known = f"; champion so far: version {before}" if before is not None else ""
    typer.echo(f"version {move.version} ({move.digest[:12]}) {what}{known}")
