"""The public `openai` client against the service, unchanged: what it sends, reads and raises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from model.generation import GenerationRequest
from tests.model.serving.http.serving import Running, paced, serving, until


def client_of(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture
def client(shipped: Running) -> Iterator[openai.OpenAI]:
    with client_of(shipped) as made:
        yield made


ASKED = {"model": "story-writer", "prompt": "Once upon a time", "max_tokens": 40, "seed": 12}


def test_a_streamed_story_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.completions.create(**ASKED)  # type: ignore[call-overload]
    stream = client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 40
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.id.startswith("cmpl-")
    assert chunks[-1].times["duration"] >= chunks[-1].times["ttft"] > 0


async def test_the_asynchronous_client_reads_the_same(shipped: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.completions.create(**ASKED)  # type: ignore[call-overload]
        stream = await client.completions.create(**ASKED, stream=True)  # type: ignore[call-overload]
        told = "".join([chunk.choices[0].text async for chunk in stream])
        several = await asyncio.gather(*(client.completions.create(**ASKED) for _ in range(4)))  # type: ignore[call-overload]
    assert told == whole.choices[0].text
    assert {answer.choices[0].text for answer in several} == {told}


def test_several_choices_stop_strings_and_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(**ASKED, n=2, stop=["."], logprobs=2)  # type: ignore[call-overload]
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert "." not in choice.text
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens).startswith(choice.text)
        assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens)


def test_a_story_that_ends_by_itself_says_stop(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="story-writer",
        prompt="The sun was going down. Sam yawned and went home.",
        max_tokens=2000,
        seed=1,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 2000


def test_names_beyond_the_contract_pass_through_extra_body(client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "return_token_ids": True}
    answer = client.completions.create(**ASKED, extra_body=extra)  # type: ignore[call-overload]
    assert len(answer.choices[0].token_ids) == 40


def test_the_models_are_read(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["story-writer"]
    assert client.models.retrieve("story-writer").owned_by == "write-me-a-story"


def test_each_failure_is_the_clients_own_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="temperature must be between 0 and 2") as wrong:
        client.completions.create(model="story-writer", prompt="x", temperature=9)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="model must be story-writer"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.NotFoundError, match="there is nothing at /v1/chat/completions"):
        client.chat.completions.create(model="story-writer", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.UnprocessableEntityError, match="arrays of tokens are not taken"):
        client.completions.create(model="story-writer", prompt=[1, 2, 3])


def test_a_full_line_is_a_rate_limit_error_that_says_when_to_come_back() -> None:
    backend, network = paced(slots=1, queue=0)
    with serving(backend) as running, client_of(running) as client:
        network.gate.clear()
        held = backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=50))
        try:
            until(lambda: backend.engine.stats().active == 1)
            with pytest.raises(openai.RateLimitError, match="try again later") as refused:
                client.completions.create(model="story-writer", prompt="x")
            assert refused.value.code == "queue_full"
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert running.figures()['story_streams_total{outcome="refused"}'] == 1
        finally:
            network.gate.set()
            held.cancel()


def test_the_client_comes_back_by_itself_when_a_place_is_free() -> None:
    backend, network = paced(slots=1, queue=0, step_seconds=0.01)
    with serving(backend) as running:
        held = backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=4000))
        until(lambda: backend.engine.stats().active == 1)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=2) as client:

            def free_after_the_first_refusal() -> None:
                until(lambda: backend.engine.stats().refused == 1)
                held.cancel()

            with ThreadPoolExecutor(1) as beside:
                freed = beside.submit(free_after_the_first_refusal)
                answer = client.completions.create(model="story-writer", prompt="x", max_tokens=3)
                freed.result(20)
    assert answer.choices[0].finish_reason == "length"
    assert len(network.calls) > 3


def test_a_failure_in_mid_story_is_raised_not_told() -> None:
    backend, network = paced()
    with serving(backend) as running, client_of(running) as client:
        network.gate.clear()
        stream = client.completions.create(
            model="story-writer", prompt="Once", max_tokens=50, stream=True, timeout=10
        )
        network.fail_next = RuntimeError("a secret of the runtime, with a path")
        network.gate.set()
        with pytest.raises(openai.APIError) as caught:
            "".join(chunk.choices[0].text for chunk in stream)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["code"] == "model_failed"
    assert "path" not in str(caught.value)


def test_closing_a_stream_early_frees_its_slot() -> None:
    backend, _ = paced(step_seconds=0.005)
    with serving(backend) as running, client_of(running) as client:
        stream = client.completions.create(model="story-writer", prompt="Once", max_tokens=4000, stream=True)
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        stream.close()
        until(lambda: backend.engine.stats().active == 0)
        assert backend.engine.stats().finished["cancelled"] == 1
