"""The verbs of `story deploy`. Each imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from model.architecture.folder import ModelFolder
    from model.serving.deployments import DeploymentStore
    from model.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 the check failed, 2 bad use or no account, 3 undecided.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine instead of text.")]
Model = Annotated[
    Path | None, typer.Option("--model", help="Model folder. Default: STORY_MODEL, else the one that ships.")
]
On = Annotated[
    Literal["modal", "loopback"],
    typer.Option("--platform", help="Where: on Modal, or as processes of this machine."),
]
AnyDeployment = Annotated[
    Literal["blue", "green"] | None, typer.Option("--deployment", help="Which one. Default: the active one.")
]
IdleDeployment = Annotated[
    Literal["blue", "green"] | None, typer.Option("--deployment", help="Which one. Default: the idle one.")
]
Patience = Annotated[
    float, typer.Option(min=0, help="Seconds that a deployment may take to wake up; 0 does not ask it.")
]


@app.command()
def upload(model: Model = None, platform: On = "modal", as_json: Json = False) -> None:
    """Bring a model folder to the platform, under its digest; one that is there is not sent again."""
    from deploy.release.platform import open_platform

    settings, _store = _opened()
    place = open_platform(platform, settings)
    folder = _folder(model, settings)
    new = place.upload(folder)
    if as_json:
        _print_json({"version": folder.digest, "uploaded": new})
    else:
        typer.echo(f"{folder.digest[:12]} {'uploaded' if new else 'is already there'}")


@app.command()
def deploy(
    model: Model = None,
    deployment: IdleDeployment = None,
    platform: On = "modal",
    patience: Patience = 300.0,
    as_json: Json = False,
) -> None:
    """Put a model on the idle deployment, wake it and check it; new stories go there only after `switch`."""
    from deploy.release.platform import open_platform
    from deploy.release.release import release

    settings, store = _opened()
    place = open_platform(platform, settings)
    folder = _folder(model, settings)
    done = release(
        folder,
        place,
        store,
        settings,
        deployment=deployment,
        patience=patience,
        tell=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        _print_json(done.as_dict())
    else:
        record = store.load()
        active = record is not None and record.active == done.deployment
        hint = "new stories go there" if active else "`story deploy switch` sends new stories there"
        typer.echo(f"{done.deployment} is ready at {done.url}; {hint}")


@app.command()
def url(deployment: AnyDeployment = None, as_json: Json = False) -> None:
    """Print where new stories go, or the address of one deployment."""
    from deploy.release.release import address_of

    _settings, store = _opened()
    chosen, address = address_of(store, deployment)
    if as_json:
        _print_json({"deployment": chosen, "url": address})
    else:
        typer.echo(address)


@app.command()
def status(as_json: Json = False) -> None:
    """Tell what runs where; exit code 1 if the active deployment could not write now. Asking may wake a deployment."""
    from deploy.release import release

    settings, store = _opened()
    told = release.status(store, settings)
    if as_json:
        _print_json(told)
    elif told["active"] is None:
        typer.echo("nothing is deployed yet")
    else:
        for name, entry in told["deployments"].items():
            mark = "active" if name == told["active"] else "idle"
            version = (entry["version"] or "-")[:12]
            typer.echo(f"{name:6} {mark:7} {version:13} {entry['health']:13} {entry['url'] or ''}".rstrip())
    active = told["deployments"].get(told["active"], {})
    raise typer.Exit(0 if active.get("ready") else 1)


@app.command()
def switch(
    to: Annotated[
        Literal["blue", "green"] | None, typer.Option(help="Which deployment. Default: the idle one.")
    ] = None,
    patience: Patience = 60.0,
    as_json: Json = False,
) -> None:
    """Send new stories to the idle deployment, once it is awake. Running stories end where they are."""
    from deploy.release import release

    settings, store = _opened()
    record = release.switch(store, settings, to, patience=patience)
    _print_record(record.model_dump(), as_json)


@app.command()
def rollback(as_json: Json = False) -> None:
    """Undo the last switch, at once and without asking anyone."""
    _settings, store = _opened()
    _print_record(store.rollback().model_dump(), as_json)


@app.command()
def smoke(deployment: AnyDeployment = None, patience: Patience = 60.0, as_json: Json = False) -> None:
    """Write a few stories on a deployment and measure them; exit code 1 if they fail, 3 if it is too busy to tell."""
    from deploy.release import smoke as checks
    from deploy.release.release import address_of

    settings, store = _opened()
    chosen, address = address_of(store, deployment)
    if patience:
        checks.warm(address, settings, version=None, patience=patience)
    report = checks.check(address, settings)
    if as_json:
        _print_json({"deployment": chosen, "url": address, **report.as_dict()})
    else:
        typer.echo(f"{chosen} {report.verdict}: {report.reason}")
        typer.echo(
            f"first text within {report.ttft_max:.2f} s, {report.total_tokens_per_second:,.0f} tokens/s in total"
        )
    raise typer.Exit({"passed": 0, "failed": 1, "undecided": 3}[report.verdict])


@app.command()
def stop(
    deployment: IdleDeployment = None,
    platform: On = "modal",
    force: Annotated[bool, typer.Option("--force", help="Also if it is the active one.")] = False,
    as_json: Json = False,
) -> None:
    """End the idle deployment; it can be deployed to again."""
    from deploy.release import release
    from deploy.release.platform import open_platform

    settings, store = _opened()
    chosen, ran = release.stop(open_platform(platform, settings), store, deployment, force=force)
    if as_json:
        _print_json({"deployment": chosen, "stopped": ran})
    else:
        typer.echo(f"{chosen} {'ended' if ran else 'did not run'}")


def _opened() -> tuple[Settings, DeploymentStore]:
    from model.serving.deployments import open_deployments
    from model.settings import load_settings

    settings = load_settings()
    return settings, open_deployments(settings)


def _folder(given: Path | None, settings: Settings) -> ModelFolder:
    from model.architecture.folder import PRETRAINED, ModelFolder

    return ModelFolder.open(given or (Path(settings.story_model) if settings.story_model else PRETRAINED))


def _print_record(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(record)
    else:
        active = record["active"]
        version = (record["versions"][active] or "")[:12]
        typer.echo(f"new stories go to {active} ({version}) at {record['urls'][active]}")


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
