"""`POST /v1/chat/completions`: OpenAI's chat contract, for a model that only continues stories.

`model.serving.http.beginning` says what of a conversation becomes the prompt. A response's text is what the client
does not have yet: the continuation, and before it the beginning where one was made from an instruction. What comes
beyond the contract is as in `model.serving.http.completions`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter
from pydantic import Field, SkipValidation
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from model.generation import MAX_LOGPROBS, MAX_TOKENS, Chunk, Completion, GenerationRequest, TokenLogprob
from model.serving.backend import ModelInfo
from model.serving.http.beginning import Turn, prompt_of
from model.serving.http.completions import OpenAIFormat, respond
from model.serving.http.errors import bad_value, json_bytes
from model.serving.http.openapi import ChatResponse, generates
from model.serving.http.schemas import IGNORED, Body, Integer, OpenAIBody, number, parse_object, shown
from model.serving.session import GenerationManager

MAX_MESSAGES = 1_000


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="text: this model reads nothing else")
    text: str = Field(description="text")


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: str | list[SkipValidation[TextPart]] = Field("", description="a text or a list of text parts")
    name: Any = Field(None, description=IGNORED)
    refusal: Any = Field(None, description=IGNORED)
    annotations: Any = Field(None, description=IGNORED)
    tool_calls: list[Any] = Field([], max_length=0, description="empty: this model calls no tools")

    def turn(self, within: str) -> Turn:
        """Return role and text of this message. Raises `ServiceError` (422)."""
        if isinstance(self.content, str):
            return Turn(self.role, self.content)
        parts = cast(list[Any], self.content)
        return Turn(
            self.role, "".join(_object(TextPart, part, f"{within}.content[{i}]").text for i, part in enumerate(parts))
        )


class ResponseFormatOption(Body):
    """The kind of text that is asked for."""

    type: Literal["text"] = Field(description="text")


class ChatBody(OpenAIBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[SkipValidation[Message]], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description=f"a list of 1 to {MAX_MESSAGES} messages, each an object with role and content"
    )
    max_completion_tokens: Annotated[Integer, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description=f"a whole number between 1 and {MAX_TOKENS}; goes before max_tokens"
    )
    logprobs: bool = Field(False, description="true or false, whether log-probabilities of the tokens come too")
    top_logprobs: Integer | None = number(None, 0, MAX_LOGPROBS, "; needs logprobs", whole=True)
    response_format: ResponseFormatOption | None = Field(
        None, description='{"type": "text"}: this model writes nothing else'
    )
    modalities: list[Literal["text"]] = Field(["text"], description='["text"]')
    tools: list[Any] = Field([], max_length=0, description="empty: this model calls no tools")
    tool_choice: Literal["none", "auto"] = Field("none", description="none or auto: this model calls no tools")
    functions: list[Any] = Field([], max_length=0, description="empty: this model calls no functions")
    function_call: Literal["none", "auto"] = Field("none", description="none or auto: this model calls no functions")
    parallel_tool_calls: Any = Field(None, description=IGNORED)
    prediction: Any = Field(None, description=IGNORED)
    reasoning_effort: Any = Field(None, description=IGNORED)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    def prompt(self) -> tuple[str, str]:
        """Return the story's prompt, and what of it the client does not have. Raises `ServiceError` (422)."""
        places = [f"messages[{index}]" for index in range(len(self.messages))]
        messages = [_object(Message, raw, place) for raw, place in zip(self.messages, places, strict=True)]
        turns = [message.turn(place) for message, place in zip(messages, places, strict=True)]
        if not any(turn.role in ("user", "assistant") for turn in turns):
            raise bad_value("messages", "must have one message of the user or the assistant at least")
        return prompt_of(turns)

    def requests(self, prompt: str) -> list[GenerationRequest]:
        """Return one request for each of `n` stories. Raises `ServiceError` (422) or `InputError`."""
        self.check()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_value("top_logprobs", "may be given only where logprobs is true")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.generation_requests([prompt], self.n, max_tokens=most, logprobs=logprobs)


def _object(kind: type[Any], raw: Any, within: str) -> Any:
    if not isinstance(raw, dict):
        raise bad_value(within, f"must be an object, got {shown(raw)}")
    return kind.read(raw, f"{within}.")


class ChatFormat(OpenAIFormat):
    """The form of chat completions."""

    id_prefix = "chatcmpl"
    names = ("chat.completion", "chat.completion.chunk")
    text_field = (b'"delta":{"content":', b"}")

    def __init__(self, body: ChatBody, requests: list[GenerationRequest], model: ModelInfo, lead: str) -> None:
        super().__init__(body, requests, model, leads=[lead] * len(requests))
        self._begun: set[int] = set()

    def opening(self) -> bytes:
        """Nothing: the first event of a story comes with its first token, from which load generators time it."""
        return b""

    def chunk(self, index: int, chunk: Chunk, at: float) -> bytes:
        return self._role(index) + super().chunk(index, chunk, at)

    def ended(self, index: int, completion: Completion) -> bytes:
        return self._role(index) + super().ended(index, completion)

    def _role(self, index: int) -> bytes:
        """Before a message's first chunk its role, with the beginning that was made for it; else nothing."""
        if index in self._begun:
            return b""
        self._begun.add(index)
        delta = {"role": "assistant", "content": self._leads[index]}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return b"%b%b%b" % (self._start, json_bytes(choice), self._tail)

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob | str]) -> dict[str, Any]:
        rows = []
        for entry in entries:
            assert not isinstance(entry, str), "a chat has no echo"
            best = [_token(text, logprob) for _, text, logprob in entry.alternatives]
            rows.append({**_token(entry.text, entry.logprob), "top_logprobs": best})
        return {"content": rows, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    """Return a token in the contract's form; one that holds half a character has no `bytes`."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def router(manager: GenerationManager) -> APIRouter:
    """Return the route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", **generates(ChatBody, ChatResponse))
    async def chat_completions(request: HttpRequest) -> Response:
        """Continue the story of a conversation, streamed as server-sent events or whole."""
        body = ChatBody.read(parse_object(await request.body()))
        prompt, lead = body.prompt()
        requests = body.requests(prompt)
        form = functools.partial(ChatFormat, body, lead=lead)
        return respond(manager, requests, form, request.headers, stream=body.stream)

    return routes
