"""The one command line, `story`: verbs only, the work is in the packages.

A verb imports what it needs when it runs, so that `story --help` answers at once and the serving verbs work
without torch and MLflow. What went wrong is said in one line on stderr; only `--debug` shows a traceback.

Exit codes: 0 fine · 1 the check failed · 2 bad use or bad input · 3 undecided · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from demo.terminal import Verbs, print_rows, write_story
from deploy.release.cli import app as deploy_verbs
from deploy.release.cli import promote
from experiments.cli import (
    REFERENCE,
    Json,
    benchmark,
    compare,
    evaluate,
    gate,
    models,
    record,
    register,
    rollback,
    sweep,
)
from experiments.users_cli import ab, arena
from model.files import ignore_broken_pipe, print_json
from model.generation import GenerationRequest, SamplingParams, new_seed
from model.wishes import Ending, Length, Wishes

if TYPE_CHECKING:
    from model.settings import Settings

DEFAULTS = SamplingParams()
app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Write, train and judge small stories with a small language model of our own.",
    epilog="Exit codes: 0 fine, 1 the check failed, 2 bad use or bad input, 3 undecided, 130 interrupted.",
)

app.add_typer(
    deploy_verbs,
    name="deploy",
    help="Two deployments of the story service: upload, deploy, check, switch and roll back.",
)

Model = Annotated[str | None, typer.Option("--model", help=f"{REFERENCE} Default: STORY_MODEL, else pretrained.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"story {version('write-me-a-story')}")
        raise typer.Exit


@app.callback()
def _all_verbs(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    # ONNX Runtime reports usage to its maker unless that is turned off before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@app.command()
def demo(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: HOST, else 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for any free one. Default: PORT, else 7860.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public Gradio link.")] = False,
    backend: Annotated[
        Literal["auto", "local", "modal"],
        typer.Option(help="Where stories are written; auto: on Modal if USE_MODAL, locally when that fails."),
    ] = "auto",
) -> None:
    """Start the app: a page on which people write stories."""
    from model.settings import load_settings

    settings = load_settings(host=host, port=port)  # a wrong one is said before what is slow to import
    from demo.asgi import launch

    launch(settings, share=share, backend=backend)


@app.command()
def write(
    prompt: Annotated[str, typer.Argument(help="The story's beginning; '' for a story from nothing.")],
    max_tokens: Annotated[int, typer.Option(help="Longest story, in tokens.")] = 400,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; up to 2.")
    ] = DEFAULTS.temperature,
    top_p: Annotated[
        float, typer.Option(help="Keep the likeliest tokens that hold this share of the probability; 1 is off.")
    ] = DEFAULTS.top_p,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0 is off.")] = DEFAULTS.top_k,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens at least this share as likely as the likeliest; 0 is off.")
    ] = DEFAULTS.min_p,
    word: Annotated[list[str] | None, typer.Option(help="Wish for a word or a name in the story. Repeatable.")] = None,
    length: Annotated[Length | None, typer.Option(help="Wish for a story of this length.")] = None,
    dialogue: Annotated[
        Literal["yes", "no"] | None, typer.Option(help="Wish that somebody speaks, or that nobody does.")
    ] = None,
    ending: Annotated[Ending | None, typer.Option(help="Wish for this ending.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed writes the same story. Default: a new one, printed.")
    ] = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Stream a story into the terminal; rate, time to first token and seed go to stderr."""
    chosen = new_seed() if seed is None else seed
    request = GenerationRequest(
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=chosen),
        wishes=Wishes(
            words=tuple(word or ()),
            length=length,
            dialogue=None if dialogue is None else dialogue == "yes",
            ending=ending,
        ),
    )
    settings = _settings()
    from experiments.registry.resolve import resolve_model

    folder = resolve_model(model or settings.story_model, settings).path
    write_story(request, folder, settings, as_json=as_json)


@app.command()
def data(
    source: Annotated[
        list[Path] | None,
        typer.Option(
            help="File or folder of stories. Text: separated by <|endoftext|>, else by blank lines, else one a line. "
            "JSON Lines, JSON array, CSV, Parquet: records with a text. Also .gz. Repeatable."
        ),
    ] = None,
    val: Annotated[
        list[Path] | None, typer.Option(help="File or folder to judge by, instead of a split. Repeatable.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch TinyStories from the Hugging Face hub as a source.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")] = Path("data/tinystories"),
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer.json instead of training one.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of a newly trained tokenizer.")] = 4096,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the stories split off where there is no --val; at most 0.5.")
    ] = 0.02,
    rename: Annotated[
        int, typer.Option(help="Add this many copies of each training story, with other names in it.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Draws the split, the tokenizer's sample and the new names.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count and report unusable lines instead of stopping at the first.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make the shards again even if they are up to date.")] = False,
    as_json: Json = False,
) -> None:
    """Make token shards to train on: read, clean, drop duplicates, split, train the tokenizer."""
    _settings()
    from rich.console import Console

    from training.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        sources=tuple(source or ()),
        val_sources=tuple(val or ()),
        out=out,
        download=download,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        rename=rename,
        seed=seed,
        skip_bad=skip_bad,
        force=force,
    )
    report = prepare(options, Console(stderr=True))
    if as_json:
        print_json(asdict(report))


@app.command()
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields of the recipe to change.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Recipe by name: small (the default), copying, copying_continued, continued, gpu-25min, "
            "own, tiny, recurrent, transformer."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Recipe as a TOML file, instead of --preset.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Token shards, as `story data` makes them. Default: data/tinystories; where that is not, the shipped "
            "model goes on with our own few stories."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and state.")] = Path("runs/story"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on exactly where the run in --out stopped, with its own recipe.")
    ] = False,
    init: Annotated[str | None, typer.Option(help=f"Checkpoint or model to start from. {REFERENCE}")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of the whole run, earlier parts of a resumed one included; it ends then."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Share the work among this many processes of this machine.")] = 1,
    track: Annotated[bool, typer.Option(help="Log the run to MLflow.")] = True,
    as_json: Json = False,
) -> None:
    """Train a model; runs go to MLflow (`story ui` shows them), Ctrl-C stops safely, --resume goes on."""
    settings = _settings()
    from rich.console import Console

    from experiments.registry.resolve import resolve_model
    from training.run import find_start, relaunch, resumed_recipe
    from training.run import train as run_training
    from training.trainer.recipe import load_recipe

    given = resume or config is not None
    begin = None if init is None else resolve_model(init, settings).path
    data, preset, begin = find_start(
        data, preset=preset, init=begin, recipe_given=given, say=Console(stderr=True, quiet="RANK" in os.environ)
    )
    # torchrun starts this same command once for each process, and gives each one its rank.
    if processes != 1 and "RANK" not in os.environ:
        raise typer.Exit(relaunch(processes, sys.argv[1:]))
    if resume and preset is None and config is None:
        recipe = resumed_recipe(out, overrides or [])
    else:
        recipe = load_recipe(preset, config, overrides or [])
    result = run_training(recipe, data=data, out=out, resume=resume, init=begin, minutes=minutes, track=track)
    if as_json and os.environ.get("RANK", "0") == "0":
        print_json(asdict(result))


app.command()(evaluate)
app.command()(benchmark)
app.command()(sweep)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a training run.")],
    out: Annotated[Path, typer.Option(help="Model folder to make.")] = Path("runs/model"),
    blend: Annotated[Path | None, typer.Option(help="Model to take the mean of the weights with.")] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Token shards to calibrate its sureness on.")] = None,
    as_json: Json = False,
) -> None:
    """Make a self-contained model folder for serving out of a checkpoint."""
    _settings()
    from training.export.export import export_checkpoint

    report = asdict(export_checkpoint(checkpoint, out, blend_with=blend, calibrate_on=calibrate))
    (print_json if as_json else print_rows)(report)


app.command()(register)
app.command()(models)
app.command()(compare)
app.command()(record)
app.command()(gate)
app.command()(promote)
app.command()(rollback)
app.command()(ab)
app.command()(arena)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65_535, help="Port on 127.0.0.1.")] = 5000) -> None:
    """Show the training runs: the MLflow UI on the project's store, on this machine only."""
    settings = _settings()
    from experiments.dashboard.mlflow_ui import serve_ui

    raise typer.Exit(1 if serve_ui(settings.mlflow_tracking_uri, port=port) else 0)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is installed and what each missing part would add; exit code 1 if no story can be written."""
    from demo.doctor import examine, stories_can_be_written

    findings = examine()
    if as_json:
        print_json({"writes": stories_can_be_written(findings), "findings": [asdict(each) for each in findings]})
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            color = {"ok": "green", "wrong": "red"}.get(finding.state, "yellow")
            typer.secho(f"{finding.state:8}", fg=color, nl=False)
            typer.echo(f"{finding.name:{width}}  {finding.detail}")
            if finding.gives:
                typer.echo(f"{'':8}{'':{width}}  → {finding.gives}")
    raise typer.Exit(0 if stories_can_be_written(findings) else 1)


def _settings() -> Settings:
    from model.settings import load_settings

    return load_settings()


def main() -> None:
    """Run the command line (the `story` script)."""
    sys.stdout = ignore_broken_pipe(sys.stdout, errors="replace")  # where the terminal's encoding lacks a character
    sys.stderr = ignore_broken_pipe(sys.stderr)
    app(prog_name="story")


if __name__ == "__main__":
    main()
