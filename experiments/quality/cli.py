"""The verb `story evaluate`. `story --help` imports this file, so it loads nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from experiments.common.cli_options import REFERENCE, Json, Track


def evaluate(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of stories to evaluate on: JSON Lines or text, also .gz. Repeatable. Default: the held-out "
            "stories of our own corpus."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"{REFERENCE} Default: STORY_MODEL, else the challenger of the store, else pretrained."),
    ] = None,
    runtime: Annotated[
        Literal["all", "native", "int8", "fp32", "torch"],
        typer.Option(help="What computes: the native decoder, an exported graph, or PyTorch in fp32."),
    ] = "all",
    limit: Annotated[int | None, typer.Option(help="Only the first N stories.")] = None,
    write: Annotated[bool, typer.Option(help="Also generate stories from fixed prompts and measure them.")] = True,
    seeds: Annotated[int, typer.Option(help="Stories generated from each prompt, at most 100.")] = 3,
    train_data: Annotated[
        list[Path] | None,
        typer.Option(
            help="What the model was trained on, a file of stories or a folder of shards: generated stories are "
            "searched for copies of it, and the n-gram baseline is counted on it. Repeatable."
        ),
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="Folder of a larger Hugging Face model that scores the stories.")
    ] = None,
    track: Track = True,
    as_json: Json = False,
) -> None:
    """Evaluate a model on held-out stories and by what it generates, beside an n-gram baseline; log it as evidence."""
    from rich.console import Console

    from experiments.quality.evaluate import evaluate_and_log
    from experiments.quality.held_out import RUNTIMES
    from experiments.quality.report import print_report, status
    from experiments.registry.resolve import challenger_reference, resolve_model
    from model.settings import load_settings

    settings = load_settings()
    uri = settings.mlflow_tracking_uri
    reference = model or settings.story_model or challenger_reference(settings)
    found = resolve_model(reference, settings)
    with status(Console(stderr=True)) as progress:
        report, evidence = evaluate_and_log(
            found.path,
            data or None,
            tracking_uri=uri if track else None,
            progress=progress,
            runtimes=RUNTIMES if runtime == "all" else (runtime,),
            limit=limit,
            threads=settings.story_threads,
            write=write,
            seeds=seeds,
            train_data=train_data or (),
            judge=judge,
        )
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "evidence": evidence}, indent=2, ensure_ascii=False))
    else:
        print_report(report, evidence, Console())
    if "failed" in evidence:
        raise typer.Exit(1)
