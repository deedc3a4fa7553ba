"""The verbs of this package, and the options that verbs share.

`story.py` imports this for every command, so that `story --help` can list them: what is slow to import is imported by
the verb that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from model.errors import InputError
from model.files import print_json

if TYPE_CHECKING:
    from rich.console import Console

    from experiments.gate.run import Move
    from experiments.registry.versions import Version

REFERENCE = "Model folder, pretrained, models:/story-writer@ALIAS or models:/story-writer/NUMBER."
"""What `--model` takes."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine instead of text.")]
Track = Annotated[bool, typer.Option(help="Log to MLflow.")]
ThresholdsFile = Annotated[
    Path | None, typer.Option("--thresholds", help="File of thresholds. Default: experiments/thresholds.yaml.")
]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Also write the report as Markdown here.")]
VersionName = Annotated[str, typer.Option(help="Number, alias or digest of a registered version.")]
Apply = Annotated[bool, typer.Option("--yes", help="Move the alias; without it, only show what would move.")]


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
        print_json(asdict(version))
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
        print_json({"versions": [asdict(version) for version in found]})
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
            f"{float(bits):.4f}" if (bits := version.tags.get("model.best_bits_per_byte")) else "",
            version.tags.get("model.step", ""),
            f"{datetime.fromtimestamp(version.created / 1000, UTC):%Y-%m-%d %H:%M}",
        )
        for version in versions
    ]
    console.print(Table(columns, rows, text=("digest", "aliases", "gate")))


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
        typer.Option(
            metavar="NAME", help="Runtime: native, int8 or fp32 (an exported graph), torch (in fp32), or all."
        ),
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
    from experiments.quality.evidence import print_report, status
    from experiments.quality.held_out import RUNTIMES
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
        print_json({**report.as_dict(), "evidence": evidence})
    else:
        print_report(report, evidence, Console())
    if "failed" in evidence:
        raise typer.Exit(1)


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
        str | None,
        typer.Option(help="Of cold, single, concurrent, stress, open, compare, with commas. Default: all that apply."),
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

    from experiments.benchmark.load import Plan
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


def gate(
    version: VersionName = "challenger",
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
    from experiments.gate import run
    from experiments.registry.resolve import resolve_model
    from model.architecture.folder import ModelFolder
    from model.settings import load_settings

    settings = load_settings()
    uri = settings.mlflow_tracking_uri
    digest = None if model is None else ModelFolder.open(resolve_model(model, settings).path).digest
    if save_champion is not None:
        run.save_losses(uri, save_champion, version=version, digest=digest)
        return
    bounds = load_thresholds(thresholds or THRESHOLDS)
    decision = run.run_gate(uri, bounds, version=version, digest=digest, against_file=against_file, track=track)
    if markdown is not None:
        markdown.write_text(run.markdown(decision), encoding="utf-8")
    if junit is not None:
        junit.write_text(run.junit(decision), encoding="utf-8")
    if as_json:
        print_json(decision.as_dict())
    else:
        run.print_decision(decision, Console())
    raise typer.Exit(decision.exit_code)


def rollback(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would move.")] = False,
    as_json: Json = False,
) -> None:
    """Give the alias champion back to the version that had it before."""
    from experiments.gate.run import rollback as move_back
    from model.settings import load_settings

    move = move_back(load_settings().mlflow_tracking_uri, apply=not dry_run)
    print_move(move, "would be champion again" if dry_run else "is champion again", as_json=as_json)


def print_move(move: Move, what: str, *, as_json: bool) -> None:
    """Print which version got the alias `champion`, or would get it."""
    if as_json:
        print_json(asdict(move))
    else:
        typer.echo(move.described(what))


def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_VERSION",
            help="A run's name or the beginning of its id, a version's number or alias. Default: the newest runs.",
        ),
    ] = None,
    newest: Annotated[int, typer.Option(min=1, help="Without names: so many training runs.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Also write curves (PNG), tables (CSV) and a page (Markdown) here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show training runs and registered versions side by side: figures, curves, and what differs between them."""
    from rich.console import Console

    from experiments.compare.frames import choose, curves, differences, table
    from experiments.compare.render import as_plain, print_comparison, write_files
    from model.settings import load_settings

    uri = load_settings().mlflow_tracking_uri
    subjects = choose(uri, names or (), newest=newest)
    figures, unlike = table(uri, subjects), differences(subjects)
    written = [] if out is None else write_files(out, figures, unlike, curves(uri, subjects))
    if as_json:
        plain = as_plain(figures, unlike) | {"files": [str(path) for path in written]}
        print_json(plain)
        return
    print_comparison(figures, unlike, Console())
    for path in written:
        typer.echo(f"wrote {path}")


def record(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_VERSION",
            help="A run's name or the beginning of its id, a version's number or alias. Default: the champion.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File to write; that of the model that ships with the project lies here.")
    ] = Path("experiments/record.json.gz"),
    as_json: Json = False,
) -> None:
    """Export how a model was made from MLflow into one small file, which the Experiments page shows without a store."""
    from experiments.dashboard.recorded import export_record, fitted, packed
    from experiments.registry.versions import CHAMPION
    from model.settings import load_settings

    made = fitted(export_record(load_settings().mlflow_tracking_uri, names or [CHAMPION]))
    content, seen = packed(made), made.overview
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise InputError("out", f"{out} cannot be written: {error.strerror}") from None
    report = {
        "bytes": len(content),
        "runs": len(seen.runs),
        "versions": len(seen.versions),
        "evaluations": len(seen.evaluations),
        "benchmarks": len(seen.benchmarks),
        "points": sum(len(curve.points) for curves in made.curves.values() for curve in curves),
        "sample_sets": sum(map(len, made.samples.values())),
    }
    if as_json:
        print_json({"out": str(out)} | report)
        return
    typer.echo(f"wrote {out}: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report.items()))


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
        Path | None, typer.Option(help="What to search, as YAML. Default: small.yaml of experiments/sweep/spaces.")
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
            help="Database of the sweeps, sqlite:///FILE or postgresql://HOST/NAME. Default: DATABASE_URL if that is "
            "PostgreSQL, else sweeps.db beside the MLflow store."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Train nothing: show the sweep as it stands.")] = False,
    track: Annotated[bool, typer.Option(help="Log the sweep and its trials to MLflow.")] = True,
    as_json: Json = False,
) -> None:
    """Search for a better recipe: many short trainings, the worse ones pruned early. Ctrl-C stops safely."""
    from rich.console import Console

    from experiments.sweep.run import SweepOptions, run_sweep
    from experiments.sweep.study import open_study, print_sweep, storage_url, study_names, summary
    from model.settings import load_settings

    settings = load_settings()
    url = storage_url(storage, settings)
    if name is None:
        names = sorted(study_names(url))
        if as_json:
            print_json({"sweeps": names})
        else:
            typer.echo("\n".join(names) or "no sweep yet")
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
        print_json(summary(study))
    else:
        print_sweep(study, Console())
    raise typer.Exit(code)
