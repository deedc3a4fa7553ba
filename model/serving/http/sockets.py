"""Socket.IO, for clients of the earlier system.

A client emits `generate_story` with the body of `/api/generate` and receives `story_token` (`{"id", "text"}`)
for each chunk, then `story_complete` with that route's object, or `story_error` with the house's error object.
Beyond the earlier system, `stop_story` ends the story, which then completes as `cancelled`. A client tells one
story at a time; when it goes, its story ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import socketio

from model.serving.backend import model_for
from model.serving.http.bodies import SimpleBody
from model.serving.http.errors import INVALID, ServiceError, as_service_error
from model.serving.http.options import ServiceOptions
from model.serving.http.session import GenerationManager, GenerationSession
from model.serving.http.simple import SimpleAnswer


@dataclass(slots=True)
class _Story:
    """The story of one client, from its request on."""

    task: asyncio.Task[Any] | None
    session: GenerationSession | None = None
    stopped: bool = False

    def stop(self) -> None:
        """End it, also where it has not begun yet."""
        self.stopped = True
        if self.session is not None:
            self.session.stop()


class Sockets:
    """The Socket.IO side of a service; `app` is what is mounted at `/socket.io`."""

    def __init__(self, manager: GenerationManager, options: ServiceOptions) -> None:
        self._manager = manager
        self._every = options.keep_alive
        self._stories: dict[str, _Story] = {}
        self._server = socketio.AsyncServer(async_mode="asgi", max_http_buffer_size=options.max_body)
        self.app = socketio.ASGIApp(self._server, socketio_path=None)
        self._server.on("generate_story", self._generate)
        self._server.on("stop_story", self._stop)
        self._server.on("disconnect", self._gone)

    async def close(self) -> None:
        """Say goodbye to all clients."""
        clients = [sid for sid, _ in self._server.manager.get_participants("/", None)]
        for sid in clients:
            await self._server.disconnect(sid)
        await self._server.shutdown()

    async def _generate(self, sid: str, data: Any = None) -> None:
        if sid in self._stories:
            busy = ServiceError(
                409, INVALID, "story_running", "a story is being told; stop it with stop_story first"
            )
            await self._server.emit("story_error", busy.body(), to=sid)
            return
        story = self._stories[sid] = _Story(asyncio.current_task())
        try:
            await self._tell(sid, story, data)
        except Exception as error:
            await self._server.emit("story_error", as_service_error(error).body(), to=sid)
        finally:
            del self._stories[sid]

    async def _tell(self, sid: str, story: _Story, data: Any) -> None:
        if not isinstance(data, dict):
            raise ServiceError(422, INVALID, "invalid_value", "generate_story needs an object with a prompt")
        request = SimpleBody.read(data).requests()[0]
        answer = SimpleAnswer(request, model_for(self._manager.backend, request.user))
        client = self._manager.limiter.clients.of(self._server.get_environ(sid)["asgi.scope"])
        async with self._manager.session([request], client) as session:
            story.session = session
            if story.stopped:
                session.stop()
            async for what in session.events(self._every):
                if what is None:
                    continue
                if what.error is not None:
                    raise what.error
                if what.chunk is not None and what.chunk.text:
                    token = {"id": answer.id, "text": what.chunk.text}
                    await self._server.emit("story_token", token, to=sid)
                elif what.completion is not None:
                    whole = answer.whole([], [what.completion], session.served_by)
                    await self._server.emit("story_complete", whole, to=sid)

    async def _stop(self, sid: str, _data: Any = None) -> None:
        if (story := self._stories.get(sid)) is not None:
            story.stop()

    async def _gone(self, sid: str, _reason: Any = None) -> None:
        if (story := self._stories.get(sid)) is not None and story.task is not None:
            story.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await story.task
