"""The embedded engine over the version that an alias names now: what is promoted is what writes.

`FollowingBackend` asks the registry every `STORY_MODEL_REFRESH` seconds. A new version is fetched, verified, loaded
beside the old one and must write a warm-up story; only then do new requests go to it. Running stories end on the old
engine, which is freed after its last one. A version that fails is refused: the old one goes on, and it is not tried
again until the alias has named another. While the registry does not answer, what runs goes on.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from model.engine.engine import Engine
from model.engine.load import warm_up
from model.errors import InputError, one_line
from model.generation import GenerationRequest
from model.serving.backend import BackendWrapper, Health, LocalBackend, Stream
from model.serving.registry import (
    SHIPPED,
    OpenRegistry,
    RegisteredVersion,
    Registry,
    RegistryError,
    ResolvedModel,
    alias_of,
    cache_folder,
    fetch,
    last_version,
    open_server,
    remember,
    resolve_model,
)
from model.settings import Settings

RETIRED_SECONDS = 3_600.0
"""Longest time that stories may run on after their version was replaced; the longest story takes far less."""

log = logging.getLogger("story.model")


class FollowingBackend(BackendWrapper[LocalBackend]):
    """Serves the version that `alias` names; see the module."""

    def __init__(self, alias: str, settings: Settings, registry: Registry) -> None:
        """Load the version; where that fails, the one that was last served, else the shipped model."""
        self._alias, self._settings, self._registry = alias, settings, registry
        self._version: RegisteredVersion | None = None
        """What serves; None: the shipped model."""
        self._refused: RegisteredVersion | None = None
        self._refusals = 0
        self._problem = ""
        self._retired: dict[LocalBackend, asyncio.Task[None]] = {}
        super().__init__(self._first())

    @property
    def engine(self) -> Engine:
        """The engine that new stories go to."""
        return self.backend.engine

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the alias; on exit cancel open streams, those on earlier versions too."""
        watch = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            for backend in (self.backend, *self._retired):
                await backend.engine.aclose()
            await asyncio.gather(*self._retired.values(), return_exceptions=True)

    def health(self) -> Health:
        """As the engine is; the detail says why it is not the version that the alias names."""
        health = self.backend.health()
        detail = f"{health.detail}; {self._problem}" if self._problem else health.detail
        return replace(health, detail=detail, models_refused=self._refusals)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Start a stream on the version that serves now; see `Backend.submit`."""
        return await self.backend.submit(request)

    async def fingerprint(self) -> str:
        """Of the version that serves now."""
        return await self.backend.fingerprint()

    async def refresh(self) -> None:
        """Ask which version the alias names, and serve it if that is another one. Raises nothing that is expected."""
        try:
            version = await asyncio.to_thread(self._registry.find, self._alias)
        except (InputError, RegistryError) as error:
            self._cannot_ask(error)
            return
        if _same(version, self._version):
            self._refused, self._problem = None, ""
        elif not _same(version, self._refused):
            await self._replace(version)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.story_model_refresh)
            try:
                await self.refresh()
            except Exception:
                log.exception("the alias %s cannot be followed", self._alias)

    async def _replace(self, version: RegisteredVersion) -> None:
        if version.digest == self.model.version:  # the same files under another number
            self.backend.model = replace(self.model, name=version.name, number=version.number, alias=self._alias)
            remember(self._registry, self._alias, version)
        else:
            new = await asyncio.to_thread(self._try, version, self._load)
            if new is None:
                return
            old, self.backend = self.backend, new
            self._retired[old] = retiring = asyncio.create_task(self._retire(old))
            retiring.add_done_callback(lambda _: self._retired.pop(old))
        self._version, self._refused, self._problem = version, None, ""
        log.info("%s (%s) serves as %s", version.name, version.digest[:12], self._alias)

    async def _retire(self, old: LocalBackend) -> None:
        await old.engine.aclose(drain=True, timeout=RETIRED_SECONDS)
        log.info("%s has ended its last story", old.model.name)

    def _first(self) -> LocalBackend:
        try:
            version = self._registry.find(self._alias)
            backend = self._try(version, self._load)
        except (InputError, RegistryError) as error:
            self._cannot_ask(error)
            backend = None
        last = last_version(self._registry, self._alias) if backend is None else None
        if last is not None and not _same(last[0], self._refused):
            found = ResolvedModel(last[1].path, last[0], self._alias)
            backend = self._try(last[0], lambda _: LocalBackend.load(self._settings, found))
        return backend or LocalBackend.load(self._settings, resolve_model(SHIPPED, self._settings))

    def _try(
        self, version: RegisteredVersion, load: Callable[[RegisteredVersion], LocalBackend]
    ) -> LocalBackend | None:
        """Load a version; None, and the reason in the health report, where that fails."""
        try:
            backend = load(version)
        except RegistryError as error:
            self._cannot_ask(error)
        except Exception as error:
            self._refuse(version, error)
        else:
            self._version = version
            return backend
        return None

    def _load(self, version: RegisteredVersion) -> LocalBackend:
        """Fetch and load a version and have it write. Raises whatever goes wrong."""
        found = ResolvedModel(fetch(self._registry, version).path, version, self._alias)
        backend = LocalBackend.load(self._settings, found)
        try:
            warm_up(backend.engine)
        except BaseException:
            backend.engine.close()
            raise
        remember(self._registry, self._alias, version)
        return backend

    def _refuse(self, version: RegisteredVersion, error: Exception) -> None:
        self._refused = version
        self._refusals += 1
        reason = one_line(error).replace(f"{cache_folder()}/", "")  # everyone can read the health route
        self._problem = f"{version.name} ({version.digest[:12]}), the {self._alias}, was refused: {reason}"
        log.warning("%s", self._problem)

    def _cannot_ask(self, error: Exception) -> None:
        """Note, and log once, why the alias cannot be followed."""
        reason = one_line(error)
        # Everyone can read the health route; where the registry is belongs into the log.
        problem = f"the {self._alias} is not known: {reason.replace(f' {self._registry.address}', '')}"
        if problem != self._problem:
            log.warning("the %s is not known: %s", self._alias, reason)
        self._problem = problem


EmbeddedBackend = LocalBackend | FollowingBackend
"""The engine in this process."""


def open_local(settings: Settings, open_registry: OpenRegistry = open_server) -> EmbeddedBackend:
    """Open the engine in this process over the settings' model; where they name an alias, it is followed.

    Raises `ModelError` when there is no usable model, and what `resolve_model` raises for a model that is no alias.
    """
    alias = alias_of(settings.story_model)
    if alias is not None:
        return FollowingBackend(alias, settings, open_registry(settings))
    return LocalBackend.load(settings, resolve_model(settings.story_model, settings, open_registry=open_registry))


def _same(version: RegisteredVersion, other: RegisteredVersion | None) -> bool:
    return other is not None and (version.number, version.digest) == (other.number, other.digest)
