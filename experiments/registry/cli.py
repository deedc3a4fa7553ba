"""The verbs `story register` and `story models`. `story --help` imports this file, so it loads nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from experiments.common.cli_options import Json

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.registry.versions import Version

BITS = "model.best_bits_per_byte"
"""Tag of a version: bits per byte on the validation stories of its training."""


def register(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Model folder or checkpoint. Default: runs/story/best, else the model that ships with the project."
        ),
    ] = None,
    alias: Annotated[Literal["challenger", "none"], typer.Option(help="Alias that the version gets.")] = "challenger",
    repair: Annotated[
        bool, typer.Option("--repair", help="Upload the files again of a version of this artifact that lacks some.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a registered version of a model in MLflow; the same artifact is never registered twice."""
    from experiments.registry.resolve import folder_to_register
    from experiments.registry.versions import register as make_version
    from model.settings import load_settings

    uri = load_settings().mlflow_tracking_uri
    folder, run_folder = folder_to_register(source)
    moved = None if alias == "none" else alias
    version = make_version(folder, uri, alias=moved, run_folder=run_folder, repair=repair)
    if as_json:
        typer.echo(json.dumps(asdict(version), indent=2))
        return
    made = "registered" if version.new else "has its files again" if repair else "was registered before"
    known = f", known as {', '.join(version.aliases)}" if version.aliases else ""
    typer.echo(f"version {version.number} ({version.digest[:12]}) {made}{known}")


def models(as_json: Json = False) -> None:
    """List the registered versions, newest first, with their aliases and verdicts."""
    from rich.console import Console

    from experiments.registry.versions import versions
    from model.settings import load_settings

    found = versions(load_settings().mlflow_tracking_uri)
    if as_json:
        typer.echo(json.dumps({"versions": [asdict(version) for version in found]}, indent=2))
    else:
        print_versions(found, Console())


def print_versions(versions: Sequence[Version], console: Console) -> None:
    """Print one row a version, or how to make the first one."""
    from experiments.common.tables import Table

    if not versions:
        console.print("No version is registered yet; `story register` makes one.")
        return
    columns = ("version", "digest", "aliases", "gate", "bits per byte", "step", "made (UTC)")
    rows = [
        (
            str(version.number),
            version.digest[:12],
            ", ".join(version.aliases),
            version.tags.get("gate", "not judged"),
            f"{float(version.tags[BITS]):.4f}" if version.tags.get(BITS) else "",
            version.tags.get("model.step", ""),
            f"{datetime.fromtimestamp(version.created / 1000, UTC):%Y-%m-%d %H:%M}",
        )
        for version in versions
    ]
    console.print(Table(columns, rows, text=("digest", "aliases", "gate")))
