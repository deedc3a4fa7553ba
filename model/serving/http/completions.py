"""`POST /v1/completions` and `/v1/models`: the OpenAI completions contract.

Beyond the contract, a response carries `seed` with each story's end (the same request with it gives that story again),
`times` and `served_by` with the usage, and with `return_token_ids` each choice's `token_ids`, the `alternatives` of
each token among its log-probabilities as (id, text, log-probability), and each chunk's `created_at`, the second (with
its fraction) in which its tokens came.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from model.generation import Chunk, Completion, GenerationRequest, TokenLogprob
from model.serving.backend import ModelInfo, model_for
from model.serving.http.errors import DONE, json_bytes, json_response, sse_event, unknown_model
from model.serving.http.openapi import get
from model.serving.http.schemas import CompletionBody, apply_cache_control, parse_object
from model.serving.http.session import GenerationManager, GenerationResponse, ResponseFormat, times_of, usage_of

MODEL_ID = "story-writer"
"""The one model name of the API; its version is sent beside it."""


class CompletionFormat(ResponseFormat):
    """A `ResponseFormat` in OpenAI's form."""

    def __init__(self, body: CompletionBody, requests: list[GenerationRequest], model: ModelInfo) -> None:
        self._body = body
        self._requests = requests
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": MODEL_ID,
            "system_fingerprint": model.version[:12],
        }
        # A chunk's bytes before its choice and after it.
        self._start = b'data: %b,"choices":[' % json_bytes(self._head)[:-1]
        self._tail = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
        self._echo = body.text() if body.echo else ""
        # Where the next token's text begins in each choice's text, for `logprobs.text_offset`.
        self._offsets = [len(self._echo)] * len(requests)

    def opening(self) -> bytes:
        """The prompt of each story, with `echo`."""
        if not self._echo:
            return b""
        return b"".join(self._chunk(index, self._echo) for index in range(len(self._requests)))

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """A chunk with the new text."""
        more: dict[str, Any] = {}
        if self._body.logprobs is not None:
            more["logprobs"] = self._logprobs(index, chunk.logprobs)
        if self._body.return_token_ids:
            more["token_ids"] = chunk.tokens
        return self._chunk(index, chunk.text, at=at, **more)

    def ended(self, index: int, completion: Completion) -> bytes:
        """A chunk without text, with the finish reason and the seed."""
        seed = self._requests[index].sampling.seed
        return self._chunk(index, "", finish_reason=completion.finish_reason, seed=seed)

    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """Usage, where it was asked for, and the end of the stream."""
        if not self._body.include_usage:
            return DONE
        return sse_event({**self._head, "choices": [], **_counts(completions, served_by)}) + DONE

    def whole(self, chunks: list[list[Chunk]], completions: list[Completion], served_by: str) -> dict[str, Any]:
        """The completion object."""
        choices = []
        for index, completion in enumerate(completions):
            choice = {
                "index": index,
                "text": self._echo + completion.text,
                "logprobs": None,
                "finish_reason": completion.finish_reason,
                "seed": self._requests[index].sampling.seed,
            }
            if self._body.logprobs is not None:
                choice["logprobs"] = self._logprobs(index, completion.logprobs)
            if self._body.return_token_ids:
                choice["token_ids"] = [token for chunk in chunks[index] for token in chunk.tokens]
            choices.append(choice)
        return {**self._head, "choices": choices, **_counts(completions, served_by)}

    def _chunk(self, index: int, text: str, *, at: float | None = None, **more: Any) -> bytes:
        rest: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None, **more}
        tail = self._tail
        if self._body.return_token_ids and at is not None:
            tail = b'],"created_at":%b%b' % (json_bytes(at), tail[1:])
        # Only what changes is encoded anew: a chunk in 11 µs instead of 18.
        return b'%b{"text":%b,%b%b' % (self._start, json_bytes(text), json_bytes(rest)[1:], tail)

    def _logprobs(self, index: int, entries: tuple[TokenLogprob, ...]) -> dict[str, list[Any]]:
        """The contract's four lists. A token of half a character counts as one U+FFFD in the offsets."""
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry.text)
        lists: dict[str, list[Any]] = {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_top(entry) for entry in entries],
            "text_offset": offsets,
        }
        if self._body.return_token_ids:
            # Two tokens can share a text (half characters do), so with ids nothing is folded together.
            lists["alternatives"] = [list(entry.alternatives) for entry in entries]
        return lists


def _top(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens' texts and the chosen one's; where two share a text, the likelier counts."""
    top: dict[str, float] = {}
    for _token, text, logprob in entry.alternatives:
        top.setdefault(text, logprob)
    top.setdefault(entry.text, entry.logprob)
    return top


def _counts(completions: list[Completion], served_by: str) -> dict[str, Any]:
    return {"usage": usage_of(completions), "times": times_of(completions), "served_by": served_by}


def router(manager: GenerationManager) -> APIRouter:
    """Return the routes under `/v1`."""
    routes = APIRouter()
    started = int(time.time())

    def model_object() -> dict[str, Any]:
        info = manager.backend.model
        return {
            "id": MODEL_ID,
            "object": "model",
            "created": started,
            "owned_by": "write-me-a-story",
            "name": info.name,
            "version": info.version,
        }

    def check_name(name: str) -> None:
        if name != MODEL_ID:
            raise unknown_model(name, MODEL_ID)

    schema = {"requestBody": {"content": {"application/json": {"schema": CompletionBody.model_json_schema()}}}}

    @routes.post("/v1/completions", openapi_extra=schema)
    async def completions(request: HttpRequest) -> Response:
        """Generate one story or several, streamed as server-sent events or whole."""
        body = CompletionBody.read(parse_object(await request.body()))
        if body.model is not None:
            check_name(body.model)
        requests = apply_cache_control(body.requests(), request.headers)
        form = CompletionFormat(body, requests, model_for(manager.backend, requests[0].user))
        return GenerationResponse(manager, requests, form, stream=body.stream)

    @get(routes, "/v1/models")
    async def models() -> Response:
        """List the one model."""
        return json_response({"object": "list", "data": [model_object()]})

    @get(routes, "/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Return the model called `name`."""
        check_name(name)
        return json_response(model_object())

    return routes
