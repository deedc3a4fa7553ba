"""Find the model that a reference names, and keep registered versions in a cache.

A reference is a model folder, `pretrained` for the model that ships with the project, or a registered version of
MLflow: `models:/story-writer@champion` by its alias, `models:/story-writer/3` by its number.

`ServerRegistry` asks an MLflow server through its REST API, without MLflow, so that a service can do it. Stores that
are databases need MLflow itself: `experiments.registry.resolve` passes its own `open_registry`.

A version's folder lies in the user's cache under its digest: downloaded beside its place, verified, and renamed. For
each reference the cache also records the version that it last named, which is used while the server does not answer.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx

from model.architecture.folder import DIGESTED, PRETRAINED, ModelFolder
from model.errors import InputError, ModelError, StoryError
from model.files import write_atomically
from model.settings import Settings

NAME = "story-writer"
"""The registered model."""
DIGEST = "artifact.digest"
"""Tag of a version: the digest of its model folder."""
FOLDER = "artifacts/folder"
"""Where in a version's files its model folder lies."""
MODELS = "models:/"
"""How MLflow's reference to a registered version begins."""
SHIPPED = "pretrained"
"""The reference to the model that ships with the project."""
KEPT = 5
"""Versions that the cache keeps, besides those that references name."""
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0

log = logging.getLogger("story.model")
_REGISTERED = re.compile(rf"{MODELS}{NAME}(?:@(?P<alias>[\w.-]+)|/(?P<number>\d+))")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_API = "api/2.0/mlflow"
_ARTIFACTS = "api/2.0/mlflow-artifacts/artifacts"


class RegistryError(StoryError):
    """The registry cannot be asked now: it does not answer, or refuses the credentials."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredVersion:
    """A registered version of the model."""

    number: int
    digest: str
    """Of its model folder; empty where the version has no such tag."""
    aliases: tuple[str, ...]
    source: str
    """Where its files lie."""

    @property
    def name(self) -> str:
        """`story-writer 3`."""
        return f"{NAME} {self.number}"


class Registry(Protocol):
    """Where versions are registered."""

    address: str
    """For messages and as a key: without credentials."""

    def find(self, wanted: str) -> RegisteredVersion:
        """Return the version with this number, alias or beginning of a digest.

        Raises `InputError` when there is none, `RegistryError` when the registry cannot be asked.
        """

    def download(self, version: RegisteredVersion, out: Path) -> None:
        """Write the version's model folder into the empty folder `out`. Raises as `find`, and `ModelError`."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """The model folder that a reference stands for."""

    path: Path
    version: RegisteredVersion | None = None
    """None: the reference named a folder."""
    alias: str = ""
    """By which the version was named, if it was."""


OpenRegistry = Callable[["Settings"], Registry]
AnyVersion = TypeVar("AnyVersion", bound=RegisteredVersion)


def parse_reference(reference: str, *, bare_names: bool = False) -> str | None:
    """Return what a registry has to look for: an alias, a number or a digest. None: the reference is no version.

    Args:
        bare_names: whether a word that is no path (`3`, `champion`, the beginning of a digest) names a version too.

    Raises `InputError` for a reference to another registered model.
    """
    if reference.startswith(MODELS):
        found = _REGISTERED.fullmatch(reference)
        if found is None:
            allowed = f"{MODELS}{NAME}@ALIAS or {MODELS}{NAME}/NUMBER"
            raise InputError("model", f"must be a folder, {SHIPPED}, {allowed}, got {reference!r}")
        return found["alias"] or found["number"]
    is_path = not bare_names or reference == SHIPPED or "/" in reference or Path(reference).is_dir()
    return None if is_path else reference


def alias_of(reference: str | None) -> str | None:
    """Return the alias that a reference names, which may move to another version; None: it names none."""
    wanted = None if reference is None else parse_reference(reference)
    return None if wanted is None or wanted.isdecimal() else wanted


def open_server(settings: Settings) -> "ServerRegistry":
    """Open the registry of the settings' MLflow server. Raises `InputError` where they name a database."""
    uri = settings.mlflow_tracking_uri
    if not uri.startswith(("http://", "https://")):
        what = f"must be the http(s) address of an MLflow server, for a service to find {MODELS}…"
        raise InputError("MLFLOW_TRACKING_URI", f"{what}; only `story` and its page read a database")
    return ServerRegistry.from_settings(settings)


def resolve_model(
    reference: str | Path | None,
    settings: Settings,
    *,
    bare_names: bool = False,
    open_registry: OpenRegistry = open_server,
) -> ResolvedModel:
    """Find the model that `reference` names; a registered version is fetched into the cache.

    Args:
        reference: see the module; None: the shipped model.
        settings: they name the registry.
        bare_names: see `parse_reference`.
        open_registry: opens it.

    Raises:
        InputError: there is no such version, or the registry is not usable.
        RegistryError: it cannot be asked, and the cache knows no version for this reference.
        ModelError: the version's files are damaged.
    """
    text = SHIPPED if reference is None else str(reference)
    wanted = parse_reference(text, bare_names=bare_names)
    if wanted is None:
        return ResolvedModel(PRETRAINED if text == SHIPPED else Path(text).expanduser())
    registry = open_registry(settings)
    try:
        version = registry.find(wanted)
        folder = fetch(registry, version)
    except RegistryError as error:
        last = last_version(registry, wanted)
        if last is None:
            raise
        version, folder = last
        log.warning("%s; %s, which %s last named, is used", error, version.name, text)
    else:
        remember(registry, wanted, version)
    return ResolvedModel(folder.path, version, wanted if wanted in version.aliases else "")


def choose(versions: Sequence[AnyVersion], wanted: str) -> AnyVersion:
    """Return the version with this number, alias or beginning of a digest (at least 8 characters).

    Raises `InputError` that names what there is.
    """
    for version in versions:
        if wanted == str(version.number) or wanted in version.aliases:
            return version
    by_digest = [each for each in versions if len(wanted) >= 8 and each.digest.startswith(wanted)]
    if len(by_digest) == 1:
        return by_digest[0]
    known = ", ".join(str(each.number) for each in versions) or "none yet; `story register` makes one"
    aliases = ", ".join(sorted(alias for each in versions for alias in each.aliases))
    raise InputError(
        "version",
        f"must be a number, an alias or a digest of a registered version, got {wanted!r}; "
        f"versions: {known}{f'; aliases: {aliases}' if aliases else ''}",
    )


def cache_folder() -> Path:
    """Return the folder of the cached versions, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "write-me-a-story" / "models"


def fetch(registry: Registry, version: RegisteredVersion) -> ModelFolder:
    """Return the version's folder out of the cache, verified; one that is not there is downloaded.

    Raises what `Registry.download` raises, and `ModelError` when the files are not those of the version's digest.
    """
    if _SHA256.fullmatch(version.digest) is None:
        raise ModelError(f"{version.name} has no tag {DIGEST}; `story register` makes versions that have")
    place = cache_folder() / version.digest
    if (cached := _opened(place, version.digest)) is not None:
        return cached
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=place.parent) as scratch:
            fetched = Path(scratch) / version.digest
            fetched.mkdir()
            registry.download(version, fetched)
            check_complete(version, [path.name for path in fetched.iterdir()])
            folder = ModelFolder.open(fetched)
            if folder.digest != version.digest:
                raise ModelError(f"{version.name} is damaged: its tag says {version.digest[:12]}, got {folder.digest}")
            try:
                fetched.rename(place)
            except OSError:
                if _opened(place, version.digest) is None:  # else another process was faster
                    raise
    except OSError as error:
        raise ModelError(f"{version.name} cannot be kept in {place.parent}: {error.strerror or error}") from None
    _remove_old(place)
    return replace(folder, path=place)


def check_complete(version: RegisteredVersion, files: Collection[str]) -> None:
    """Raise `ModelError` if the model folder of a version lacks one of the files that its digest covers."""
    if lost := [name for name in (*DIGESTED, "digest") if name not in files]:
        what = f"{version.name} ({version.digest[:12]}) lacks {', '.join(lost)} in {version.source}/{FOLDER}"
        raise ModelError(f"{what}; `story register MODEL --repair`, with the same model, uploads its files again")


def remember(registry: Registry, wanted: str, version: RegisteredVersion) -> None:
    """Record which version a reference names, for the time when the registry cannot be asked."""
    known = {"number": version.number, "digest": version.digest, "aliases": version.aliases, "source": version.source}
    try:
        write_atomically(_record(registry, wanted), json.dumps(known) + "\n")
    except OSError as error:  # or another process, which wrote the same, was faster
        log.warning("%s is not cached: %s", version.name, error)


def last_version(registry: Registry, wanted: str) -> tuple[RegisteredVersion, ModelFolder] | None:
    """Return the version that a reference last named, with its cached folder; None: there is none, or it is damaged."""
    try:
        known = json.loads(_record(registry, wanted).read_bytes())
        version = RegisteredVersion(**known | {"aliases": tuple(known["aliases"])})
        folder = _opened(cache_folder() / version.digest, version.digest)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return None if folder is None else (version, folder)


def _record(registry: Registry, wanted: str) -> Path:
    key = hashlib.sha256(f"{registry.address} {wanted}".encode()).hexdigest()[:16]
    return cache_folder() / f"{key}.json"


def _opened(place: Path, digest: str) -> ModelFolder | None:
    """Return a cached folder and mark it as used; None: it is not there, or damaged."""
    try:
        folder = ModelFolder.open(place)
        os.utime(place)
    except (ModelError, OSError):
        return None
    return folder if folder.digest == digest else None


def _remove_old(kept: Path) -> None:
    """Remove the least recently used versions that no reference names. One that is loaded needs its files no more."""
    named = {kept.name}
    for record in kept.parent.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            named.add(json.loads(record.read_bytes())["digest"])
    with contextlib.suppress(OSError):
        others = [each for each in kept.parent.iterdir() if _SHA256.fullmatch(each.name) and each.name not in named]
        for old in sorted(others, key=lambda each: -each.stat().st_mtime)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)


class ServerRegistry:
    """The registry of an MLflow server, through its REST API; files come through its artifact proxy."""

    def __init__(self, address: str, **credentials: Any) -> None:
        """`address`: the server's root, without credentials; those are options of `httpx.Client`."""
        self.address = address.rstrip("/")
        self._credentials = credentials

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Open the server at `MLFLOW_TRACKING_URI`, with the credentials in it or those of the other settings."""
        parts = urlsplit(settings.mlflow_tracking_uri)
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        password, token = settings.mlflow_tracking_password, settings.mlflow_tracking_token
        if parts.username is not None:
            return cls(address, auth=(unquote(parts.username), unquote(parts.password or "")))
        if settings.mlflow_tracking_username is not None and password is not None:
            return cls(address, auth=(settings.mlflow_tracking_username, password.get_secret_value()))
        return cls(address, headers=token and {"Authorization": f"Bearer {token.get_secret_value()}"})

    def find(self, wanted: str) -> RegisteredVersion:
        """See `Registry.find`."""
        with self._client() as client:
            if wanted.isdecimal():
                answer = self._ask(client, "model-versions/get", name=NAME, version=wanted)
            else:
                answer = self._ask(client, "registered-models/alias", name=NAME, alias=wanted)
            if answer is not None:
                return _version(answer["model_version"], [] if wanted.isdecimal() else [wanted])
            return choose(self._versions(client), wanted)

    def download(self, version: RegisteredVersion, out: Path) -> None:
        """See `Registry.download`."""
        with self._client() as client:
            answer = self._ask(client, "model-versions/get-download-uri", name=NAME, version=str(version.number))
            parts = urlsplit("" if answer is None else answer["artifact_uri"])
            if parts.scheme != "mlflow-artifacts" or parts.netloc not in ("", urlsplit(self.address).netloc):
                what = f"{version.name} lies at {parts.scheme or 'an unknown place'}:…, where {self.address} does not"
                raise ModelError(f"{what} fetch it from; start that server with --serve-artifacts")
            root = f"{parts.path.strip('/')}/{FOLDER}"
            for entry in (self._ask(client, "", under=_ARTIFACTS, path=root) or {}).get("files", []):
                name = str(entry["path"]).rpartition("/")[2]
                if not entry.get("is_dir") and name not in ("", "..", "."):
                    self._save(client, f"{_ARTIFACTS}/{quote(f'{root}/{name}')}", out / name)

    def _client(self) -> httpx.Client:
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        return httpx.Client(base_url=self.address, timeout=timeout, **self._credentials)

    def _versions(self, client: httpx.Client) -> list[RegisteredVersion]:
        """All versions, newest first."""
        found = self._ask(client, "model-versions/search", filter=f"name='{NAME}'", max_results="1000") or {}
        model = self._ask(client, "registered-models/get", name=NAME) or {"registered_model": {}}
        aliases = model["registered_model"].get("aliases", [])
        versions = [
            _version(each, [entry["alias"] for entry in aliases if entry["version"] == each["version"]])
            for each in found.get("model_versions", [])
        ]
        return sorted(versions, key=lambda each: -each.number)

    def _ask(self, client: httpx.Client, what: str, under: str = f"{_API}/", **query: str) -> Any:
        """Return the answer; None: there is no such thing. Raises `RegistryError`."""
        with self._get(client, f"{under}{what}", query) as answer:
            return None if answer is None else json.loads(answer.read())

    def _save(self, client: httpx.Client, url: str, path: Path) -> None:
        with self._get(client, url) as answer, path.open("wb") as file:
            if answer is None:
                raise ModelError(f"{path.name} of the version is not at {self.address}")
            for part in answer.iter_bytes():
                file.write(part)

    @contextlib.contextmanager
    def _get(
        self, client: httpx.Client, url: str, query: dict[str, str] | None = None
    ) -> Iterator[httpx.Response | None]:
        try:
            with client.stream("GET", url, params=query) as answer:
                yield None if self._absent(answer) else answer
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RegistryError(f"the MLflow server {self.address} does not answer: {type(error).__name__}") from None

    def _absent(self, answer: httpx.Response) -> bool:
        """Whether the server says that there is no such thing. Raises `RegistryError` for all but that and success."""
        if answer.is_success:
            return False
        if answer.status_code in (401, 403):
            names = "MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
            raise RegistryError(f"the MLflow server {self.address} refuses the credentials: set {names}")
        if answer.status_code in (400, 404):  # an alias that is not there is a 400, a version is a 404
            return True
        raise RegistryError(f"the MLflow server {self.address} answers with status {answer.status_code}")


def _version(answer: dict[str, Any], aliases: Sequence[str]) -> RegisteredVersion:
    tags = {tag["key"]: tag.get("value", "") for tag in answer.get("tags", [])}
    return RegisteredVersion(
        number=int(answer["version"]),
        digest=tags.get(DIGEST, ""),
        aliases=tuple(sorted({*answer.get("aliases", []), *aliases})),
        source=answer.get("source", ""),
    )
