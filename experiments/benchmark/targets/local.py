"""The engine in this process: what the page's own backend gives, with no network between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from experiments.benchmark.targets.base import Ending, Failed, Listener
from model.errors import BusyError, StoryError
from model.generation import GenerationRequest
from model.serving.backend import LocalBackend
from model.settings import Settings
from training.tracking.provenance import ROOT

COLD = "experiments.benchmark.targets.cold"


class LocalTarget:
    """An embedded engine. `folder` is the model that a new process loads for a cold start."""

    cold_start_means = "a new process, from its start to its first token"
    cold_starts = 3

    def __init__(self, backend: LocalBackend, folder: Path | None, *, name: str = "local") -> None:
        self.name = name
        self._backend = backend
        self._folder = folder

    @classmethod
    def load(cls, settings: Settings, *, name: str = "local") -> LocalTarget:
        """The engine that the settings describe. Raises `ModelError` when the model is missing or damaged."""
        backend = LocalBackend.load(settings)
        return cls(backend, Path(settings.story_model) if settings.story_model else None, name=name)

    @property
    def digest(self) -> str | None:
        """Of the model folder."""
        return self._backend.model.version

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the engine for as long as this context is open."""
        async with self._backend.running():
            yield

    async def write(self, request: GenerationRequest, listener: Listener) -> Ending:
        """Write one story in this process."""
        try:
            stream = await self._backend.submit(request)
        except BusyError as error:
            raise Failed("busy", str(error)) from None
        except StoryError as error:
            raise Failed("error", str(error)) from None
        try:
            async for piece in stream:
                if piece.tokens:
                    listener.arrived(len(piece.tokens))
            listener.whole()
        finally:
            stream.cancel()  # frees the slot when this request's time is up; harmless when it has ended
        done = stream.completion
        if done.finish_reason not in ("stop", "length"):
            raise Failed("error", done.error or f"the story ended as {done.finish_reason}")
        return Ending(done.finish_reason, done.usage.completion_tokens)

    async def write_cold(self, request: GenerationRequest, listener: Listener) -> Ending:
        """Start a process that loads the model and writes the first token."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        if self._folder is not None:
            environment["STORY_MODEL"] = str(self._folder)
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", COLD, request.prompt),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert child.stdout is not None
            if await child.stdout.readline() == b"first\n":
                listener.arrived(1)
                listener.whole()
            _, told = await child.communicate()
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode != 0:
            last = told.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise Failed("error", f"the process ended with status {child.returncode}: {last[0]}")
        return Ending("length", 1)

    def processes(self) -> list[int]:
        """This process: engine and benchmark in one."""
        return [os.getpid()]
