"""Find what is installed, what works, and what each missing part would add (`story doctor`).

Packages are looked up in their metadata, without importing them. The model is tested by generating a few tokens.
"""

import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from model.errors import InputError, StoryError
from model.serving.http.server import bound
from model.settings import Settings, load_settings, without_password

DISTRIBUTION = "write-me-a-story"
SETS = {
    "serving": "writing stories and the page",
    "train": "`story data`, `train`, `evaluate`, `export` and `ui`",
    "modal": "writing and training on Modal's machines",
    "postgres": "storing A/B events in PostgreSQL",
    "dev": "`make test`",
}
"""The sets of packages that pyproject.toml names, and what each one is for."""

MODAL_PATIENCE = 3.0
"""Seconds for the service on Modal to answer: one that is up does in one, one that starts takes longer."""

State = Literal["ok", "missing", "off", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `gives` says what it would give, where it is missing or off."""

    name: str
    state: State
    detail: str
    gives: str = ""


def examine() -> list[Finding]:
    """Look at everything once; nothing raises, what is wrong becomes a finding."""
    findings = [Finding("python", "ok", platform.python_version()), *_packages()]
    try:
        settings = load_settings()
    except StoryError as error:
        gives = "the story command, once the variable is put right"
        return [*findings, Finding("settings", "wrong", str(error), gives)]
    named = [name.upper() for name in Settings.model_fields if name in settings.model_fields_set]
    findings.append(Finding("settings", "ok", ", ".join(named) or "all at their defaults"))
    findings += [_model(settings), _native(), _port(settings), _mlflow(settings), _modal(settings)]
    return [*findings, _browser()]


def stories_can_be_written(findings: list[Finding]) -> bool:
    """Whether a story was written during the examination."""
    return any(finding.name == "model" and finding.state == "ok" for finding in findings)


def _packages() -> Iterator[Finding]:
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "wrong", f"{DISTRIBUTION} is not installed here", "`make demo` installs it")
        return
    wanted = defaultdict(list)
    for requirement in requirements:
        extra = re.search(r"""extra\s*==\s*["'](\w+)["']""", requirement)
        package = re.split(r"[^\w.-]", requirement)[0]
        if package != DISTRIBUTION:
            wanted[extra[1] if extra else "serving"].append(package)
    for group, purpose in SETS.items():
        present, absent = [], []
        for name in wanted[group]:
            try:
                present.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                absent.append(name)
        if absent:
            order = "." if group == "serving" else f"'.[{group}]'"
            how = f"{purpose}: .venv/bin/pip install -e {order} -c constraints.txt"
            yield Finding(group, "missing", f"without {', '.join(absent)}", how)
        else:
            yield Finding(group, "ok", ", ".join(present))


def _model(settings: Settings) -> Finding:
    try:
        from experiments.registry.resolve import open_registry
        from model.engine.load import warm_up
        from model.serving.following import open_local

        backend = open_local(settings.model_copy(update={"story_slots": 1}), open_registry)
        with backend.engine as engine:
            completion, detail = warm_up(engine), backend.health().detail
    except Exception as error:  # whatever the reason is, it is what the user asked for
        reason = str(error) if isinstance(error, StoryError) else f"{type(error).__name__}: {error}"
        return Finding("model", "wrong", reason, "stories: name another model in STORY_MODEL, or clone afresh")
    usage = completion.usage
    wrote = f"wrote {usage.completion_tokens} tokens at {usage.tokens_per_second:,.0f} a second"
    shown = f"{backend.model.name} (digest {backend.model.version[:12]}), {engine.runtime_name}"
    return Finding("model", "ok", f"{shown}: {wrote}{detail.removeprefix('ready')}")


def _native() -> Finding:
    """The compiled decoder: there or not, and what it computes with on this machine."""
    try:
        from model.runtimes.native.library import paths

        return Finding("native", "ok", f"built; this processor runs {', '.join(paths())}")
    except StoryError as error:
        gives = "stories at several times the speed of ONNX Runtime, which writes until then"
        return Finding("native", "missing", str(error), gives)


def _port(settings: Settings) -> Finding:
    where = f"{settings.host}:{settings.port}"
    try:
        bound(settings.host, settings.port).close()
    except InputError:
        gives = "`story demo` there: stop what listens, or name another one with PORT or --port"
        return Finding("port", "off", f"{where} is taken, perhaps by a running demo", gives)
    return Finding("port", "ok", f"{where} is free")


def _mlflow(settings: Settings) -> Finding:
    uri = settings.mlflow_tracking_uri
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        return Finding("mlflow", "off", f"{uri} does not exist", "training curves; `story train` makes it")
    return Finding("mlflow", "ok", without_password(uri))


def _modal(settings: Settings) -> Finding:
    if settings.modal_endpoint_url is None:
        return Finding("endpoint", "off", "MODAL_ENDPOINT_URL is not set", "writing on a GPU at Modal")
    from model.serving.deployments import open_deployments
    from model.serving.remote.client import fetch_model_info, proxy_auth

    try:
        headers = proxy_auth(settings)
        url = open_deployments(settings).endpoint(settings.modal_endpoint_url) or settings.modal_endpoint_url
    except StoryError as error:
        return Finding("endpoint", "wrong", str(error), "writing on a GPU at Modal, once that is put right")
    token = "with a proxy token" if headers else "without a proxy token"
    used = "used by `--backend auto`" if settings.use_modal else "not used: USE_MODAL is off"
    shown = f"{without_password(url)}, {token}, {used}"
    answer = fetch_model_info(url, headers, MODAL_PATIENCE)
    if isinstance(answer, str):
        why = "it may be starting (ask again), or not be deployed, or want a token"
        return Finding("endpoint", "off", f"{shown}: {answer}", f"writing on a GPU at Modal; {why}")
    return Finding("endpoint", "ok", f"{shown}: answers, with {answer.name} (version {answer.version[:12]})")


def _browser() -> Finding:
    found = shutil.which("chromium")
    if found is None:
        return Finding("chromium", "missing", "not on the PATH", "the browser tests (Debian: chromium)")
    return Finding("chromium", "ok", found)
