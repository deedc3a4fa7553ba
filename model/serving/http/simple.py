"""`POST /api/generate`: the simple form, for a script or a page that wants a story and no contract.

Whole: one object with `text` (what the model wrote), `story` (the prompt with it), `finish_reason`, `seed`,
counts and times. As events: `token` for each chunk (`{"text"}`), then `complete` with that same object, or
`error`. Socket.IO tells the same under its own names.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import ModelInfo, model_for
from model.serving.http.answer import StoryResponse, times_of, usage_of
from model.serving.http.bodies import SimpleBody, as_asked, parse_object
from model.serving.http.completions import MODEL_ID
from model.serving.http.options import ServiceOptions
from model.serving.http.session import GenerationManager
from model.serving.http.wire import event


class SimpleAnswer:
    """A `model.serving.http.answer.Answer` in few words, for one story."""

    def __init__(self, request: GenerationRequest, model: ModelInfo) -> None:
        self.id = f"story-{uuid.uuid4().hex}"
        self._request = request
        self._model = model

    def opening(self) -> bytes:
        """Nothing: the client knows its prompt."""
        return b""

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """`token`, or nothing for a token whose text is still to come."""
        return event({"text": chunk.text}, "token") if chunk.text else b""

    def ended(self, index: int, completion: Completion) -> bytes:
        """Nothing: `closing` tells all."""
        return b""

    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """`complete`, with the whole object."""
        return event(self.whole([], completions, served_by), "complete")

    def whole(
        self, chunks: list[list[Chunk]], completions: list[Completion], served_by: str
    ) -> dict[str, Any]:
        """The story with all that is known of it."""
        completion = completions[0]
        return {
            "id": self.id,
            "prompt": self._request.prompt,
            "text": completion.text,
            "story": self._request.prompt + completion.text,
            "finish_reason": completion.finish_reason,
            "seed": self._request.sampling.seed,
            "model": MODEL_ID,
            "version": self._model.version,
            "served_by": served_by,
            "usage": usage_of(completions),
            "times": times_of(completions),
        }


def router(manager: GenerationManager, options: ServiceOptions) -> APIRouter:
    """The one route."""
    routes = APIRouter()
    schema = {"requestBody": {"content": {"application/json": {"schema": SimpleBody.model_json_schema()}}}}

    @routes.post("/api/generate", openapi_extra=schema)
    async def generate(request: Request) -> Response:
        """Write one story, as events or whole."""
        body = SimpleBody.read(parse_object(await request.body()))
        requests = as_asked(body.requests(), request.headers)
        answer = SimpleAnswer(requests[0], model_for(manager.backend, requests[0].user))
        return StoryResponse(
            manager,
            requests,
            answer,
            stream=body.stream,
            name=options.name,
            keep_alive=options.keep_alive,
        )

    return routes
