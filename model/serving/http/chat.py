"""`POST /v1/chat/completions`: OpenAI's chat contract, for a model that only continues stories.

A response's text is what the client does not have yet: the continuation, and before it the beginning where one was made
from an instruction. What comes beyond the contract is as in `model.serving.http.completions`. How a conversation
becomes the prompt of a story:

1. System and developer messages do not become text of the story.
2. The last user message is the story's beginning, without space around it.
3. If that message is an instruction, a beginning is made of its subject, and the response begins with it: "Write a
   story about a fox named Ember" becomes "Once upon a time, there was a fox named Ember.".
4. "Continue this story: …" stands for the text after it.
5. If the last message is the assistant's, or the user only asks it to go on, the assistant's text is continued; its
   beginning, if that was the user's own text, is put before it.

Only English instructions are recognised, as the model writes English; any other text is a beginning.
"""

import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

from fastapi import APIRouter
from pydantic import Field, SkipValidation
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from model.generation import MAX_LOGPROBS, MAX_TOKENS, Chunk, Completion, GenerationRequest, TokenLogprob
from model.serving.backend import ModelInfo
from model.serving.http.completions import OpenAIFormat, respond
from model.serving.http.openapi import ChatResponse, generates
from model.serving.http.response import bad_value, json_bytes
from model.serving.http.schemas import IGNORED, Body, Integer, OpenAIBody, number, parse_object, shown
from model.serving.session import GenerationManager

MAX_INSTRUCTION = 400
"""Characters; a longer text is a beginning."""
NOTHING = "Once upon a time"
"""The beginning for an instruction without a subject."""


class Turn(NamedTuple):
    """A message of a conversation."""

    role: str
    text: str


def prompt_of(turns: Sequence[Turn]) -> tuple[str, str]:
    """Return the story's prompt, and what of it the client does not have yet.

    `turns` hold one of the user or of the assistant at least.
    """
    answered = any(role == "assistant" and text for role, text in turns)  # there is something to continue
    story: list[str] = []  # the assistant's texts since the message that asked for the story, last one first
    for role, text in reversed(turns):
        if role == "assistant":
            story.append(text)
        elif role == "user" and not (_GO_ON.fullmatch(text.strip()) and answered):
            prompt, lead = beginning_of(text)
            if not any(story):
                return prompt, lead
            return _join([*([] if lead else [prompt]), *reversed(story)]), ""
    return _join(story[::-1]), ""


def _join(texts: Sequence[str]) -> str:
    """Join what are parts of one story; a space is put between two sentences where a client has removed it."""
    story = ""
    for text in texts:
        story += " " + text if _SENTENCE_END.search(story) and text[:1].isalnum() else text
    return story


def beginning_of(message: str) -> tuple[str, str]:
    """Return the prompt of a user's message, and what of it the response has to begin with."""
    text = message.strip()
    asked = _ASIDE.sub("", text)
    if found := _CONTINUE.fullmatch(text):
        return _unquoted(found["text"]), ""
    if len(text) > MAX_INSTRUCTION:
        return text, ""
    if found := _STARTING_WITH.fullmatch(asked):
        made = _unquoted(found["text"] or found["quoted"])
    elif found := _INSTRUCTION.fullmatch(asked) or _ABOUT.fullmatch(asked) or _TITLE.fullmatch(asked):
        made = _beginning(**found.groupdict())
    else:
        made = ""
    return made or text, made


def _beginning(link: str | None = None, subject: str | None = None) -> str:
    """Return the beginning of a story with this subject; empty where it is no subject after all."""
    if link is None or subject is None:
        return NOTHING
    subject, *more = _SENTENCES.split(subject.strip())
    shorter = ""
    while shorter != subject:
        shorter, subject = subject, _TRAILING.sub("", subject)
    if subject.count('"') % 2 or subject.count("“") != subject.count("”"):
        return ""  # speech that began before: the text is a story's own
    if not re.search(r"\w", subject):
        return NOTHING
    rest = "".join(f" {sentence}" for sentence in more if not _WISH.match(sentence))
    link = " ".join(link.lower().split())
    someone = link not in _NO_PERSON or (link == "with" and re.search(r"\b(?:named|called)\b", subject))
    kind = _ARTICLE.match(subject) if someone else None
    if kind:
        verb = "were" if kind["many"] else "was"
        return f"Once upon a time, there {verb} {kind[0].lower()}{subject[kind.end() :]}.{rest}"
    if someone and not rest and _NAMES.fullmatch(subject):
        return f"Once upon a time, {subject}"
    return f"This is a story {link} {subject}.{rest}"


def _unquoted(text: str) -> str:
    text = text.strip()
    for opening, closing in ('""', "“”", "''", "\u2018\u2019", "«»"):
        if len(text) > 1 and text[0] == opening and text[-1] == closing and closing not in text[1:-1]:
            return text[1:-1].strip()
    return text


_POLITE = (
    r"(?:(?:please|hi|hello|hey|ok|okay|now)\b[,.!]?\s+|(?:can|could|would|will)\s+you\s+"
    r"|i(?:\s+would|'d|\u2019d)?\s+(?:like|want|need)\s+(?:you\s+)?to\s+|let's\s+)*"
)
_VERB = (
    r"(?:(?:write|tell|give|make(?:\s+up)?|create|generate|compose|invent|read|craft|start|begin|hear|have"
    r"|i(?:\s+would|'d|\u2019d)?\s+(?:like|want|need))\s+)"
    r"(?:(?:me|us|him|her|them|my\s+\w+)\s+)?"
)
_STORY = r"(?:story|tale|fairy\s?tale|fable|poem|rhyme)"
_AUDIENCE = r"(?:\s+(?:for|to)\s+(?:[\w'\u2019-]+\s+){0,4}?[\w'\u2019-]+)?"
_LINK = (
    r"(?P<link>about|of|featuring|starring|involving|with|where|in\s+which|on|called|titled|entitled|named|set\s+in)"
)
_KINDS = (
    r"(?:(?:very|short|long|little|brief|new|funny|happy|sad|scary|sweet|cute|nice|good|great|simple|silly|magical|exciting"
    r"|interesting|bedtime|children[\u2019']?s|kids?[\u2019']?s?|adventure|fantasy|tiny|quick|beautiful|gentle)(?:,|\s+and)?\s+)*"
)
_NO_PERSON = {"with", "where", "in which", "on", "called", "titled", "entitled", "named", "set in"}
_FLAGS = re.IGNORECASE | re.DOTALL

_GO_ON = re.compile(
    rf"{_POLITE}(?:continue|go\s+on|keep\s+(?:going|writing)|carry\s+on|write\s+more|(?:tell\s+me\s+)?more"
    r"|(?:and\s+)?then(?:\s+what)?|what\s+happen(?:s|ed)\s+(?:next|then)|next|finish)"
    r"(?:\s+(?:it|(?:the|this|that|your)\s+(?:story|tale)))?(?:,?\s+please)?[\s.!?…]*",
    _FLAGS,
)
_CONTINUE = re.compile(
    rf"{_POLITE}(?:continue|finish|complete|go\s+on\s+with)\s+(?:(?:the|this|my|our)\s+)?(?:following\s+)?"
    rf"(?:{_STORY}|text|beginning|sentence)?\s*(?::|\n)\s*(?P<text>\S.*)",
    _FLAGS,
)
_STARTING_WITH = re.compile(
    rf"{_POLITE}{_VERB}(?:an?|the)\s+{_KINDS}{_STORY}{_AUDIENCE},?\s+(?:that|which)?\s*(?:starts|starting|begins|beginning)"
    r"\s+(?:with|like\s+this|as\s+follows)(?:\s+the\s+(?:words?|sentence|line))?\s*(?::\s*(?P<text>\S.*)"
    r'|(?P<quoted>["“\u2018\'].*["”\u2019\'])\.?)',
    _FLAGS,
)
_INSTRUCTION = re.compile(
    rf"{_POLITE}{_VERB}(?:[\w'\u2019-]+,?\s+){{0,6}}?{_STORY}{_AUDIENCE}(?:\s+{_LINK}\s+(?P<subject>\S.*)|(?:,?\s+please)?[.!?]*)",
    _FLAGS,
)
_ABOUT = re.compile(rf"{_POLITE}(?:write|tell\s+(?:me|us))\s+(?P<link>about)\s+(?P<subject>\S.*)", _FLAGS)
_TITLE = re.compile(rf"(?:(?:an?|another|one)\s+)?{_KINDS}{_STORY}\s+(?P<link>about)\s+(?P<subject>[^.!?]+)", _FLAGS)
"""An instruction without a verb, "a short story about a fox": one that ends like a sentence may be a story's own."""

_ASIDE = re.compile(r"\s*\([^()]*\)")
_SENTENCE_END = re.compile(r"[.!?][\"”'\u2019)]?\Z")
_SENTENCES = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])\s+")
_TRAILING = re.compile(
    r"(?:[,;:]?\s*\b(?:please|thanks|thank\s+you)|[\s.!?,;:…]+"
    r"|,?\s+(?:in|of|with|using)\s+(?:(?:at\s+most|no\s+more\s+than|less\s+than|fewer\s+than|under|about|around|up\s+to)\s+)?"
    r"\d+\s+(?:words?|sentences?|lines?|paragraphs?|tokens?)"
    r"|,?\s+for\s+(?:(?:my|young|small|little)\s+)*(?:kids|children|toddlers|son|daughter))\Z",
    re.IGNORECASE,
)
"""What says how to write and not what about, at the end of a subject."""
_WISH = re.compile(
    r"(?:please|make|keep|use|write|include|end|start|begin|add|give|let|do|don['\u2019]t|avoid|be|thanks|thank|you|i|it\s+(?:should|must)"
    r"|(?:the|this)\s+(?:story|tale|ending|moral|length)|in\s+\d|no\s+more|at\s+most|at\s+least|maximum|max)\b",
    re.IGNORECASE,
)
"""A sentence that says how to write."""
_ARTICLE = re.compile(
    r"(?:(?P<many>(?:a\s+few|a\s+couple\s+of|two|three|four|five|six|seven|eight|nine|ten|some|several|many)\b)|(?:an?|one)\b)",
    re.IGNORECASE,
)
_NAME = r"[A-Z][\w'\u2019-]*(?:\s+[A-Z][\w'\u2019-]*){0,2}"
_NAMES = re.compile(
    rf"{_NAME}(?:(?:,|\s+and|,\s+and|\s+the)\s+(?:(?:his|her|their|the|an?)\s+)?(?:[\w'\u2019-]+)(?:\s+[A-Z][\w'\u2019-]*)?){{0,3}}"
)


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
