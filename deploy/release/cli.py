"""The verbs of `story deploy`, and `story promote`, which can deploy what it promoted.

Each imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from experiments.cli import REFERENCE, Apply, Json, ThresholdsFile, VersionName, print_move
from model.files import print_json

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

Model = Annotated[str | None, typer.Option("--model", help=f"{REFERENCE} Default: STORY_MODEL, else pretrained.")]
On = Annotated[
    Literal["modal", "loopback"], typer.Option("--platform", help="Where: on Modal, or as processes of this machine.")
]
Name = Literal["blue", "green"]
ActiveOr = Annotated[Name | None, typer.Option("--deployment", help="Which one. Default: the active one.")]
IdleOr = Annotated[Name | None, typer.Option("--deployment", help="Which one. Default: the idle one.")]
Timeout = Annotated[
    float, typer.Option(min=0, help="Seconds that a deployment may take to become ready; 0 does not ask it.")
]


@app.command()
def upload(model: Model = None, platform: On = "modal", as_json: Json = False) -> None:
    """Upload a model folder to the platform, under its digest; one that is there is not sent again."""
    from deploy.release.platforms import open_platform

    settings, _store = _open()
    place = open_platform(platform, settings)
    folder = _folder(model, settings)
    new = place.upload(folder)
    text = f"{folder.digest[:12]} {'uploaded' if new else 'is already there'}"
    _print({"version": folder.digest, "uploaded": new}, text, as_json)


@app.command()
def deploy(
    model: Model = None,
    deployment: IdleOr = None,
    platform: On = "modal",
    timeout: Timeout = 300.0,
    as_json: Json = False,
) -> None:
    """Start a model as the idle deployment and check it; it gets new requests only after `switch`."""
    from deploy.release.platforms import open_platform
    from deploy.release.release import release

    settings, store = _open()
    place, folder = open_platform(platform, settings), _folder(model, settings)
    done = release(folder, place, store, settings, deployment=deployment, timeout=timeout, progress=_progress)
    state = store.load()
    active = state is not None and state.active == done.deployment
    hint = "new stories go there" if active else "`story deploy switch` sends new stories there"
    _print(asdict(done), f"{done.deployment} is ready at {done.url}; {hint}", as_json)


@app.command()
def url(deployment: ActiveOr = None, as_json: Json = False) -> None:
    """Print where new requests go, or the address of one deployment."""
    from deploy.release.release import address_of

    _settings, store = _open()
    chosen, address = address_of(store, deployment)
    _print({"deployment": chosen, "url": address}, address, as_json)


@app.command()
def status(as_json: Json = False) -> None:
    """Show what runs where; exit code 1 if the active deployment is not ready. Asking may wake a deployment."""
    from deploy.release import release

    settings, store = _open()
    result = release.status(store, settings)
    lines = []
    for name, entry in result["deployments"].items():
        mark = "active" if name == result["active"] else "idle"
        version = (entry["version"] or "-")[:12]
        lines.append(f"{name:6} {mark:7} {version:13} {entry['health']:13} {entry['url'] or ''}".rstrip())
    _print(result, "\n".join(lines) or "nothing is deployed yet", as_json)
    active = result["deployments"].get(result["active"], {})
    raise typer.Exit(0 if active.get("ready") else 1)


@app.command()
def switch(
    to: Annotated[Name | None, typer.Option(help="Which deployment. Default: the idle one.")] = None,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Send new requests to the idle deployment, once it is ready. Running ones finish where they are."""
    from model.serving.remote.readiness import switch as switch_when_ready

    settings, store = _open()
    state = switch_when_ready(store, settings, to, timeout=timeout)
    _print(state.model_dump(), state.described(), as_json)


@app.command()
def rollback(as_json: Json = False) -> None:
    """Undo the last switch, at once and without asking a deployment."""
    _settings, store = _open()
    state = store.rollback()
    _print(state.model_dump(), state.described(), as_json)


@app.command()
def smoke(deployment: ActiveOr = None, timeout: Timeout = 60.0, as_json: Json = False) -> None:
    """Generate a few stories on a deployment; exit code 1 if they fail, 3 if it is too busy to decide."""
    from deploy.release import release
    from model.serving.remote.readiness import wait_until_ready

    settings, store = _open()
    chosen, address = release.address_of(store, deployment)
    if timeout:
        wait_until_ready(address, settings, version=None, timeout=timeout)
    report = release.check(address, settings)
    text = (
        f"{chosen} {report.verdict}: {report.reason}\n"
        f"first text within {report.ttft_max:.2f} s, {report.total_tokens_per_second:,.0f} tokens/s in total"
    )
    _print({"deployment": chosen, "url": address, **asdict(report)}, text, as_json)
    raise typer.Exit({"passed": 0, "failed": 1, "undecided": 3}[report.verdict])


@app.command()
def stop(
    deployment: IdleOr = None,
    platform: On = "modal",
    force: Annotated[bool, typer.Option("--force", help="Also if it is the active one.")] = False,
    as_json: Json = False,
) -> None:
    """End the idle deployment; it can be deployed to again."""
    from deploy.release import release
    from deploy.release.platforms import open_platform

    settings, store = _open()
    chosen, ran = release.stop(open_platform(platform, settings), store, deployment, force=force)
    _print({"deployment": chosen, "stopped": ran}, f"{chosen} {'ended' if ran else 'did not run'}", as_json)


def promote(
    version: VersionName = "challenger",
    thresholds: ThresholdsFile = None,
    apply: Apply = False,
    and_deploy: Annotated[
        bool, typer.Option("--deploy", help="Then start it as the idle deployment, check it and switch to it.")
    ] = False,
    platform: On = "modal",
    timeout: Timeout = 300.0,
    as_json: Json = False,
) -> None:
    """Make a version the champion if the gate passed it; shows what it would do until --yes is given.

    If its deployment fails, it stays the champion; `story rollback` undoes that.
    """
    from deploy.release.platforms import open_platform
    from deploy.release.release import release
    from experiments.common.thresholds import THRESHOLDS, load_thresholds
    from experiments.gate.run import promote as move_up
    from model.errors import InputError
    from model.serving.registry import MODELS, NAME
    from model.serving.remote.readiness import switch

    if and_deploy and not apply:
        raise InputError("--deploy", "goes with --yes only")
    settings, store = _open()
    # Before the alias moves: it stays where it is if nothing can be deployed.
    place = open_platform(platform, settings) if and_deploy else None
    move = move_up(
        settings.mlflow_tracking_uri, load_thresholds(thresholds or THRESHOLDS), version=version, apply=apply
    )
    if place is None or not as_json:
        print_move(move, "promoted" if apply else "would be promoted (--yes does it)", as_json=as_json)
    if place is None:
        return
    folder = _folder(f"{MODELS}{NAME}/{move.version}", settings)
    done = release(folder, place, store, settings, deployment=None, timeout=timeout, progress=_progress)
    state = switch(store, settings, done.deployment, timeout=timeout)
    _print({**asdict(move), "release": asdict(done), "active": state.active}, state.described(), as_json)


def _progress(line: str) -> None:
    typer.echo(line, err=True)


def _open() -> tuple[Settings, DeploymentStore]:
    from model.serving.deployments import open_deployments
    from model.settings import load_settings

    settings = load_settings()
    return settings, open_deployments(settings)


def _folder(given: str | None, settings: Settings) -> ModelFolder:
    from experiments.registry.resolve import resolve_model
    from model.architecture.folder import ModelFolder

    return ModelFolder.open(resolve_model(given or settings.story_model, settings).path)


def _print(values: object, text: str, as_json: bool) -> None:
    """Print the result of a verb, for a machine or for people."""
    if as_json:
        print_json(values)
    else:
        typer.echo(text)
