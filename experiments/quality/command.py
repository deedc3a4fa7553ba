"""The verb `story evaluate`: its options, and nothing else that takes time to load.

`story.py` imports this for every verb, so that `story --help` can list it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of stories to judge by: JSON Lines or text, also .gz. Repeatable. Default: the held-out "
            "stories of our own corpus."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model folder. Default: STORY_MODEL, else the challenger of the store, else the shipped one."
        ),
    ] = None,
    runtime: Annotated[
        Literal["all", "native", "int8", "fp32", "torch"],
        typer.Option(help="What computes: the decoder in C, an exported graph, or PyTorch in fp32."),
    ] = "all",
    limit: Annotated[int | None, typer.Option(help="Only the first N stories.")] = None,
    write: Annotated[
        bool, typer.Option(help="Also write from 64 fixed prompts and measure those stories.")
    ] = True,
    seeds: Annotated[int, typer.Option(help="Stories written from each prompt, at most 100.")] = 3,
    train_data: Annotated[
        list[Path] | None,
        typer.Option(
            help="What the model was trained on, a file of stories or a folder of shards: written stories are "
            "searched for copies of it, and the floor is counted on it. Repeatable."
        ),
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Folder of a larger Hugging Face model, which reads the stories.")
    ] = None,
    track: Annotated[bool, typer.Option(help="Log the figures as evidence to MLflow.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for a machine instead of text.")
    ] = False,
) -> None:
    """Judge a model on held-out stories and by what it writes, beside an n-gram table; log it as evidence."""
    from model.settings import load_settings

    settings = load_settings()
    from rich.console import Console

    from experiments.quality.evaluate import RUNTIMES, evaluate_and_log
    from experiments.quality.status import working
    from experiments.quality.tables import print_report
    from experiments.registry.resolve import challenger_reference, resolve_model

    reference = model or settings.story_model or challenger_reference(settings)
    uri = settings.mlflow_tracking_uri
    with resolve_model(reference, uri) as found, working(Console(stderr=True)) as tell:
        report, evidence = evaluate_and_log(
            found.path,
            data or None,
            tracking_uri=settings.mlflow_tracking_uri if track else None,
            runtimes=RUNTIMES if runtime == "all" else (runtime,),
            limit=limit,
            threads=settings.story_threads,
            write=write,
            seeds=seeds,
            train_data=train_data or (),
            judge=judge,
            progress=tell,
        )
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "evidence": evidence}, indent=2, ensure_ascii=False))
    else:
        print_report(report, evidence, Console())
    if "failed" in evidence:
        raise typer.Exit(1)
