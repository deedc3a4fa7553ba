"""The command `story sweep`: its options, and nothing that is slow to import.

`story.py` imports this for every command, so that `story --help` can list it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from experiments.common.cli_options import Json


def sweep(
    name: Annotated[
        str | None, typer.Argument(help="Name of the sweep, which begins or continues it. Default: list all.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials of the sweep in all; earlier ones count.")] = 20,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training for each trial.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Instead of minutes: steps of the space's own recipe; a trial with larger batches makes fewer, so "
            "that all see equally many tokens."
        ),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="What to search, as YAML. Default: experiments/sweep/spaces/small.yaml.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Token shards; on Modal, their name on the Volume. Default: data/tinystories.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the best trial's checkpoint. Default: runs/sweeps/NAME.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampler. Default: 0.")] = None,
    workers: Annotated[int, typer.Option(help="Trials at once: processes here, containers on Modal.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each process. Default: the cores, shared out.")
    ] = None,
    on: Annotated[Literal["here", "modal"] | None, typer.Option(help="Where to train. Default: here.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Database of the sweeps, sqlite:///FILE or postgresql://… Default: DATABASE_URL if that is "
            "PostgreSQL, else sweeps.db beside the MLflow store."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Train nothing: show the sweep as it stands.")] = False,
    track: Annotated[bool, typer.Option(help="Log the sweep and its trials to MLflow.")] = True,
    as_json: Json = False,
) -> None:
    """Search for a better recipe: many short trainings, the worse ones pruned early. Ctrl-C stops safely."""
    from rich.console import Console

    from experiments.sweep.render import print_sweep, summary
    from experiments.sweep.run import SweepOptions, run_sweep
    from experiments.sweep.study import open_study, storage_url, study_names
    from model.settings import load_settings

    settings = load_settings()
    url = storage_url(storage, settings)
    if name is None:
        names = sorted(study_names(url))
        typer.echo(json.dumps({"sweeps": names}) if as_json else "\n".join(names) or "no sweep yet")
        return
    code = 0
    if show:
        study = open_study(url, name)
    else:
        study, code = run_sweep(
            SweepOptions(
                name=name,
                storage=url,
                trials=trials,
                minutes=minutes,
                steps=steps,
                space=space,
                data=data,
                out=out,
                seed=seed,
                workers=workers,
                threads=threads,
                place=on,
                tracking_uri=settings.mlflow_tracking_uri if track else None,
            )
        )
    if as_json:
        typer.echo(json.dumps(summary(study), ensure_ascii=False, indent=2))
    else:
        print_sweep(study, Console())
    raise typer.Exit(code)
