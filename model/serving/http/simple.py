"""`POST /api/generate`: the simple form, for a script or a page that wants a story and no contract.

Whole: one object with `text` (what was generated), `story` (the prompt with it), `finish_reason`, `seed`, counts and
times. As events: `token` for each chunk (`{"text"}`), then `complete` with that same object, or `error`. Socket.IO
sends the same under its own names.
"""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from model.generation import Chunk, Completion, GenerationRequest
from model.serving.backend import ModelInfo, model_for
from model.serving.http.completions import MODEL_ID
from model.serving.http.errors import sse_event
from model.serving.http.schemas import SimpleBody, apply_cache_control, parse_object
from model.serving.http.session import (
    GenerationManager,
    GenerationResponse,
    ResponseFormat,
    times_of,
    usage_of,
)


class SimpleFormat(ResponseFormat):
    """A `ResponseFormat` of few fields, for one story."""

    def __init__(self, request: GenerationRequest, model: ModelInfo) -> None:
        self.id = f"story-{uuid.uuid4().hex}"
        self._request = request
        self._model = model

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """`token`, or nothing for a token whose text is still to come."""
        return sse_event({"text": chunk.text}, "token") if chunk.text else b""

    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """`complete`, with the whole object."""
        return sse_event(self.whole([], completions, served_by), "complete")

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


def router(manager: GenerationManager) -> APIRouter:
    """Return the route."""
    routes = APIRouter()
    schema = {"requestBody": {"content": {"application/json": {"schema": SimpleBody.model_json_schema()}}}}

    @routes.post("/api/generate", openapi_extra=schema)
    async def generate(request: HttpRequest) -> Response:
        """Generate one story, as events or whole."""
        body = SimpleBody.read(parse_object(await request.body()))
        requests = apply_cache_control(body.requests(), request.headers)
        form = SimpleFormat(requests[0], model_for(manager.backend, requests[0].user))
        return GenerationResponse(manager, requests, form, stream=body.stream)

    return routes
