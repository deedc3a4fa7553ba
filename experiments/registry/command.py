"""The verbs `story register` and `story models`: their options, and nothing else that takes time to load.

`story.py` imports this for every verb, so that `story --help` can list them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine instead of text.")]


def register(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Model folder or checkpoint. Default: runs/story/best, else the model that ships with the project."
        ),
    ] = None,
    alias: Annotated[
        Literal["challenger", "none"], typer.Option(help="Alias that the version gets.")
    ] = "challenger",
    as_json: Json = False,
) -> None:
    """Make a registered version of a model in MLflow; the same artifact is never registered twice."""
    from experiments.registry.shown import print_version
    from experiments.registry.source import opened
    from experiments.registry.versions import register as make_version
    from model.settings import load_settings

    uri = load_settings().mlflow_tracking_uri
    folder, run_folder = opened(source)
    version = make_version(folder, uri, alias=None if alias == "none" else alias, run_folder=run_folder)
    print_version(version, as_json=as_json)


def models(as_json: Json = False) -> None:
    """List the registered versions, newest first, with their aliases and verdicts."""
    from experiments.registry.shown import print_versions
    from experiments.registry.versions import versions
    from model.settings import load_settings

    found = versions(load_settings().mlflow_tracking_uri)
    if as_json:
        typer.echo(json.dumps({"versions": [version.as_dict() for version in found]}, indent=2))
    else:
        print_versions(found)
