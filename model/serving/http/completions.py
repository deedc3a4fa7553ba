"""`POST /v1/completions` and `/v1/models`: the OpenAI completions contract.

Beyond the contract, a response carries `seed` with each story's end (the same request with it gives that story again),
`times` and `served_by` with the usage, and with `return_token_ids` each choice's `token_ids`, the `alternatives` of
each token among its log-probabilities as (id, text, log-probability), and each chunk's `created_at`, the second (with
its fraction) in which its tokens came.
"""

import functools
import math
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from model.generation import Chunk, Completion, GenerationRequest, PromptEcho, TokenLogprob
from model.serving.backend import ModelInfo, model_for
from model.serving.http.openapi import CompletionResponse, ModelList, ModelResponse, errors_of, generates, get
from model.serving.http.response import (
    DONE,
    GenerationResponse,
    ResponseFormat,
    bad_value,
    json_bytes,
    json_response,
    sse_event,
    times_of,
    unknown_model,
    usage_of,
)
from model.serving.http.schemas import MODEL_ID, CompletionBody, OpenAIBody, apply_cache_control, parse_object
from model.serving.session import GenerationManager


class OpenAIFormat(ResponseFormat):
    """A `ResponseFormat` in OpenAI's form. Subclasses name text and log-probabilities as their contract does."""

    id_prefix: ClassVar[str]
    names: ClassVar[tuple[str, str]]
    """`object` of a whole response and of a chunk."""
    text_field: ClassVar[tuple[bytes, bytes]]
    """What stands before a chunk's text and after it."""

    def __init__(
        self, body: OpenAIBody, requests: list[GenerationRequest], model: ModelInfo, *, leads: Sequence[str] = ()
    ) -> None:
        """`leads`: text that comes before each story's own, if any."""
        self._body = body
        self._requests = requests
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.names[body.stream],
            "created": int(time.time()),
            "model": MODEL_ID,
            "system_fingerprint": model.version[:12],
        }
        # A chunk's bytes before its choice and after it.
        self._start = b'data: %b,"choices":[' % json_bytes(self._head)[:-1]
        self._tail = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
        self._leads = leads or [""] * len(requests)
        self._count = body.count
        self._detailed = body.wants_logprobs or body.return_token_ids

    def opening(self) -> bytes:
        """The text that comes before each story, if any."""
        return b"".join(self._chunk(index, lead) for index, lead in enumerate(self._leads) if lead)

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        """A chunk with the new text, and before it one with the prompt where that comes back."""
        prompt = b""
        if (echo := chunk.prompt) is not None:
            more = self._details(index, _scored(echo), prompt_token_ids=echo.tokens)
            prompt = self._chunk(index, echo.text, **more)
        if not (chunk.text or chunk.tokens or chunk.logprobs):
            return prompt
        more = self._details(index, chunk.logprobs, token_ids=chunk.tokens) if self._detailed else {}
        return prompt + self._chunk(index, chunk.text, at=at, **more)

    def ended(self, index: int, completion: Completion) -> bytes:
        """A chunk without text, with the finish reason and the seed."""
        seed = self._requests[index].sampling.seed
        return self._chunk(index, "", finish_reason=completion.finish_reason, seed=seed)

    def closing(self, completions: list[Completion], served_by: str) -> bytes:
        """Usage, where it was asked for, and the end of the stream."""
        if not self._body.include_usage:
            return DONE
        return sse_event({**self._head, "choices": [], **self._counts(completions, served_by)}) + DONE

    def whole(self, chunks: list[list[Chunk]], completions: list[Completion], served_by: str) -> dict[str, Any]:
        """The whole object."""
        choices: list[dict[str, Any]] = []
        for index in self._best(completions):
            completion, prompt = completions[index], completions[index].prompt
            lead = self._leads[index] if prompt is None else prompt.text
            entries = (*(() if prompt is None else _scored(prompt)), *completion.logprobs)
            ids = {} if prompt is None else {"prompt_token_ids": prompt.tokens}
            ids["token_ids"] = tuple(token for chunk in chunks[index] for token in chunk.tokens)
            choices.append(
                {
                    "index": len(choices),
                    **self._message(lead + completion.text),
                    "logprobs": None,
                    "finish_reason": completion.finish_reason,
                    "seed": self._requests[index].sampling.seed,
                    **self._details(index, entries, **ids),
                }
            )
        return {**self._head, "choices": choices, **self._counts(completions, served_by)}

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]:
        """Return a whole choice's field with its text."""

    @abstractmethod
    def _logprobs(self, index: int, entries: Sequence[TokenLogprob | str]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens of choice `index`; one that has none comes as its text."""

    def _details(self, index: int, entries: Sequence[TokenLogprob | str], **ids: tuple[int, ...]) -> dict[str, Any]:
        """Return log-probabilities and token ids of a choice, as far as they were asked for."""
        found: dict[str, Any] = ids if self._body.return_token_ids else {}
        if self._body.wants_logprobs:
            found["logprobs"] = self._logprobs(index, entries)
        return found

    def _best(self, completions: list[Completion]) -> list[int]:
        """Return the choices that come back: of each prompt's, the `n` with the highest mean log-probability."""
        indices, count, n = list(range(len(completions))), self._count, self._body.n
        if count == n:
            return indices
        groups = [indices[first : first + count] for first in indices[::count]]
        ranked = [sorted(group, key=lambda one: -_mean_logprob(completions[one])) for group in groups]
        return [index for group in ranked for index in group[:n]]

    def _counts(self, completions: list[Completion], served_by: str) -> dict[str, Any]:
        usage = usage_of(completions, per_prompt=self._count)
        return {"usage": usage, "times": times_of(completions), "served_by": served_by}

    def _chunk(self, index: int, text: str, *, at: float | None = None, **more: Any) -> bytes:
        rest: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None, **more}
        tail = self._tail
        if self._body.return_token_ids and at is not None:
            tail = b'],"created_at":%b%b' % (json_bytes(at), tail[1:])
        before, after = self.text_field
        # Only what changes is encoded anew: a chunk in 11 µs instead of 18.
        return b"%b{%b%b%b,%b%b" % (self._start, before, json_bytes(text), after, json_bytes(rest)[1:], tail)


class CompletionFormat(OpenAIFormat):
    """The form of completions."""

    id_prefix = "cmpl"
    names = ("text_completion", "text_completion")
    text_field = (b'"text":', b"")

    def __init__(self, body: CompletionBody, requests: list[GenerationRequest], model: ModelInfo) -> None:
        leads = [str(request.prompt) if body.echo and not request.echo else "" for request in requests]
        super().__init__(body, requests, model, leads=leads)
        # Where the next token's text begins in each choice's text, for `logprobs.text_offset`.
        self._offsets = [len(lead) for lead in self._leads]

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob | str]) -> dict[str, list[Any]]:
        """The contract's four lists. A token of half a character counts as one U+FFFD in the offsets."""
        texts = [entry if isinstance(entry, str) else entry.text for entry in entries]
        offsets = [*accumulate(map(len, texts), initial=self._offsets[index])]
        self._offsets[index] = offsets.pop()
        lists: dict[str, list[Any]] = {
            "tokens": texts,
            "token_logprobs": [None if isinstance(entry, str) else entry.logprob for entry in entries],
            "top_logprobs": [None if isinstance(entry, str) else _top(entry) for entry in entries],
            "text_offset": offsets,
        }
        if self._body.return_token_ids:
            # Two tokens can share a text (half characters do), so with ids nothing is folded together.
            lists["alternatives"] = [[] if isinstance(entry, str) else list(entry.alternatives) for entry in entries]
        return lists


def _scored(prompt: PromptEcho) -> list[TokenLogprob | str]:
    """Return the tokens of a prompt, if their log-probabilities were asked for; the first has a text only."""
    return [entry or text for entry, text in zip(prompt.logprobs, prompt.token_texts, strict=False)]


def _top(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens' texts and the chosen one's; where two share a text, the likelier counts."""
    top: dict[str, float] = {}
    for _token, text, logprob in entry.alternatives:
        top.setdefault(text, logprob)
    top.setdefault(entry.text, entry.logprob)
    return top


def _mean_logprob(completion: Completion) -> float:
    """Return the mean log-probability of a story's tokens; a story without tokens is the worst."""
    logprobs = [entry.logprob for entry in completion.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


def respond(
    manager: GenerationManager,
    requests: list[GenerationRequest],
    make_format: Callable[[list[GenerationRequest], ModelInfo], ResponseFormat],
    headers: Mapping[str, str],
    *,
    stream: bool,
) -> Response:
    """Generate `requests` and return their response in the format that is made for them."""
    if len(requests) > (most := manager.backend.capacity):
        raise bad_value("prompt", f"asks for {len(requests)} stories at once; this service holds {most}")
    requests = apply_cache_control(requests, headers)
    form = make_format(requests, model_for(manager.backend, requests[0].user))
    return GenerationResponse(manager, requests, form, stream=stream)


def router(manager: GenerationManager) -> APIRouter:
    """Return the routes of completions and models."""
    routes = APIRouter()
    started = int(time.time())

    def model_object() -> dict[str, Any]:
        info = manager.backend.model
        return {"id": MODEL_ID, "object": "model", "created": started, "owned_by": "write-me-a-story", **info.as_dict()}

    @routes.post("/v1/completions", **generates(CompletionBody, CompletionResponse))
    async def completions(request: HttpRequest) -> Response:
        """Generate one story or several, streamed as server-sent events or whole."""
        body = CompletionBody.read(parse_object(await request.body()))
        form = functools.partial(CompletionFormat, body)
        return respond(manager, body.requests(), form, request.headers, stream=body.stream)

    @get(routes, "/v1/models", responses={200: {"model": ModelList}})
    async def models() -> Response:
        """List the one model."""
        return json_response({"object": "list", "data": [model_object()]})

    @get(routes, "/v1/models/{name:path}", responses={200: {"model": ModelResponse}, **errors_of(404, 422)})
    async def model(name: str) -> Response:
        """Return the model called `name`."""
        if name != MODEL_ID:
            raise unknown_model(name, MODEL_ID)
        return json_response(model_object())

    return routes
