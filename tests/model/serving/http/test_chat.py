"""The chat contract, with raw requests and with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from model.errors import InputError
from model.generation import Chunk, Completion, Usage
from model.serving.backend import ModelInfo
from model.serving.http.chat import ChatBody, ChatFormat
from model.serving.http.response import ServiceError, as_service_error
from tests.model.serving.http.serving import Running, streaming

FOX = "A fox could not sleep."
MADE = "Once upon a time, there was a fox named Ember."


@pytest.fixture
def client(shipped: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shipped.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def said(text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "story-writer",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 30,
        "seed": 5,
    } | more


def completion(running: Running, prompt: str) -> str:
    answer = running.post("/v1/completions", prompt=prompt, max_tokens=30, seed=5).json()
    text: str = answer["choices"][0]["text"]
    return text


def test_a_beginning_is_continued_as_the_completion_of_the_same_text(shipped: Running) -> None:
    answer = shipped.post("/v1/chat/completions", **said(FOX)).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": completion(shipped, FOX), "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"], choice["seed"]) == ("length", None, 5)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 30
    assert usage["total_tokens"] == usage["prompt_tokens"] + 30


def test_an_instruction_is_answered_with_a_whole_story(client: openai.OpenAI, shipped: Running) -> None:
    answer = client.chat.completions.create(**said("Write a story about a fox named Ember"))
    assert answer.choices[0].message.content == MADE + completion(shipped, MADE)


def test_the_assistants_text_is_continued_without_being_repeated(client: openai.OpenAI, shipped: Running) -> None:
    conversation = [{"role": "user", "content": FOX}, {"role": "assistant", "content": " He got up"}]
    answer = client.chat.completions.create(**said("", messages=conversation))
    assert answer.choices[0].message.content == completion(shipped, f"{FOX} He got up")


def test_a_stream_begins_with_the_role_and_makes_up_the_whole(client: openai.OpenAI) -> None:
    asked = said("Write a story about a fox named Ember", n=2)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].usage == whole.usage
    for index, expected in enumerate(whole.choices):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", MADE)
        assert all(choice.delta.role is None for choice in own[1:])
        assert "".join(choice.delta.content or "" for choice in own) == expected.message.content
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]


def test_the_role_comes_with_the_first_token_of_each_story_also_of_one_without_tokens() -> None:
    body = ChatBody.read(said(FOX, n=2, stream=True))
    form = ChatFormat(body, body.requests(FOX), ModelInfo("a", "b" * 64), lead="")
    assert form.opening() == b"", "load generators time the first event"
    assert form.chunk(0, Chunk(" He", (5,)), 1.0).count(b'"role":"assistant"') == 1
    assert b'"role"' not in form.chunk(0, Chunk(" sat", (6,)), 1.1)
    ended = Completion("", "stop", Usage(5, 0, 0.0, 0.0, 0.0))
    assert b'"role"' not in form.ended(0, ended)
    assert form.ended(1, ended).count(b'"role":"assistant"') == 1


def test_the_clients_own_stream_helper_reads_it(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**said(FOX, stop=["."])) as stream:  # it raises for "length"
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert stream.get_final_completion().choices[0].message.content == text


def test_log_probabilities_are_those_of_the_completion(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**said(FOX, logprobs=True, top_logprobs=3))
    same = client.completions.create(model="story-writer", prompt=FOX, max_tokens=30, seed=5, logprobs=3)
    found, expected = answer.choices[0].logprobs, same.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert expected is not None
    assert [row.token for row in found.content] == expected.tokens
    assert [row.logprob for row in found.content] == expected.token_logprobs
    assert all(len(row.top_logprobs) == 3 for row in found.content)
    assert b"".join(bytes(row.bytes or []) for row in found.content).decode() == answer.choices[0].message.content


def test_the_length_goes_by_either_name(client: openai.OpenAI) -> None:
    asked = said(FOX, max_completion_tokens=4)
    assert client.chat.completions.create(**asked).usage.completion_tokens == 4
    del asked["max_tokens"]
    assert client.chat.completions.create(**asked).usage.completion_tokens == 4


def test_text_parts_are_read_as_one_text() -> None:
    parts = [{"type": "text", "text": "A fox could"}, {"type": "text", "text": " not sleep."}]
    body = ChatBody.read({"messages": [{"role": "user", "content": parts, "name": "Mia"}]})
    assert body.prompt() == (FOX, "")


def test_harmless_fields_of_the_contract_are_ignored(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**said(FOX))
    answer = client.chat.completions.create(
        **said(FOX),
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        reasoning_effort="low",
        parallel_tool_calls=False,
    )
    assert answer.choices == plain.choices


def prompts_of(body: dict[str, Any]) -> list[str]:
    read = ChatBody.read(body)
    return [str(request.prompt) for request in read.requests(read.prompt()[0])]


USER = {"role": "user", "content": FOX}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "must be given: a list of 1 to 1000 messages"),
        ({"messages": []}, "messages", "each an object with role and content, got []"),
        ({"messages": ["hi"]}, "messages[0]", "must be an object, got 'hi'"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "must be given: system, developer"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "user or assistant, got 'tool'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "must have one message of the user or the"),
        ({"messages": [USER | {"content": 5}]}, "messages[0].content", "must be a text or a list of text"),
        ({"messages": [USER | {"content": [IMAGE]}]}, "messages[0].content[0].image_url", "is not known"),
        (
            {"messages": [USER | {"content": [{"type": "audio", "text": "x"}]}]},
            "messages[0].content[0].type",
            "must be text",
        ),
        (
            {"messages": [USER | {"tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "must be empty: this model calls no tools",
        ),
        ({"messages": [USER | {"colour": 1}]}, "messages[0].colour", "is not known; the nearest is "),
        ({"tools": [{"type": "function"}]}, "tools", "must be empty: this model calls no tools"),
        ({"tool_choice": "required"}, "tool_choice", "must be none or auto: this model calls no tools"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            'must be {"type": "text"}: this model writes',
        ),
        ({"modalities": ["audio"]}, "modalities", "must be [\"text\"], got ['audio']"),
        ({"top_logprobs": 3}, "top_logprobs", "may be given only where logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "must be a whole number between 0 and 20, got 21"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be a whole number between 1 and 4096"),
        ({"prompt": "x"}, "prompt", "is not known; the nearest is "),
    ],
)
def test_a_wrong_field_is_named_with_its_place(body: dict[str, Any], param: str, message: str) -> None:
    if "messages" not in body and body:
        body = {"messages": [USER], **body}
    with pytest.raises((ServiceError, InputError)) as caught:
        prompts_of(body)
    shown = as_service_error(caught.value)
    assert (shown.status, shown.param, shown.code) == (422, param, "invalid_value")
    assert message in str(shown)


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model must be story-writer"):
        client.chat.completions.create(**said(FOX, model="gpt-4"))


def test_the_raw_events_end_as_the_contract_says(shipped: Running) -> None:
    with streaming(shipped, "/v1/chat/completions", **said(FOX, max_tokens=2)) as flow:
        found = [data for _, data in flow]
    assert found[-1] == "[DONE]"
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-2]["choices"][0] == {
        "delta": {"content": ""},
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
        "seed": 5,
    }
