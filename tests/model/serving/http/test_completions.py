"""The completions contract, with raw requests and with OpenAI's own client."""

from __future__ import annotations

import asyncio
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from model.generation import GenerationRequest
from tests.model.serving.http.serving import Running, paced, serving, streaming, until

HEAD = {"id", "object", "created", "model", "system_fingerprint"}


def whole(running: Running, **body: Any) -> dict[str, Any]:
    response = running.post("/v1/completions", **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_whole_completion_has_every_field_of_the_contract(shipped: Running) -> None:
    answer = whole(shipped, prompt="Once upon a time", max_tokens=12, seed=3)
    assert answer.keys() == HEAD | {"choices", "usage", "times", "served_by"}
    assert re.fullmatch(r"cmpl-[0-9a-f]{32}", answer["id"])
    assert (answer["object"], answer["model"]) == ("text_completion", "story-writer")
    assert abs(answer["created"] - time.time()) < 60
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "seed"}
    assert (choice["index"], choice["finish_reason"], choice["seed"]) == (0, "length", 3)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert 0 <= answer["times"]["queued"] <= answer["times"]["ttft"] <= answer["times"]["duration"]


def test_the_chunks_of_a_stream_make_up_the_whole(shipped: Running) -> None:
    asked: dict[str, Any] = {
        "prompt": "The old boat had a secret.",
        "max_tokens": 60,
        "seed": 8,
        "return_token_ids": True,
    }
    with streaming(shipped, **asked, stream_options={"include_usage": True}) as flow:
        chunks = [data for _, data in flow]
    answer = whole(shipped, **asked)
    assert chunks.pop() == "[DONE]"
    last = chunks.pop()
    assert last["choices"] == []
    assert last["usage"] == answer["usage"]
    assert last["times"].keys() == {"queued", "ttft", "duration"}
    assert last["served_by"] == "local"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    (expected,) = answer["choices"]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == expected["token_ids"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * (len(choices) - 1) + [expected["finish_reason"]]
    assert choices[-1]["seed"] == 8


def test_without_the_option_a_stream_carries_no_usage(shipped: Running) -> None:
    with streaming(shipped, prompt="x", max_tokens=3) as flow:
        chunks = [data for _, data in flow]
    assert chunks[-1] == "[DONE]"
    assert not any("usage" in chunk or "created_at" in chunk for chunk in chunks[:-1])


def test_a_story_asked_for_again_by_its_own_seed_is_the_same(shipped: Running) -> None:
    several = whole(shipped, prompt="Mia found a key.", max_tokens=25, n=3)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert len({choice["text"] for choice in several}) == 3
    for choice in several:
        again = whole(shipped, prompt="Mia found a key.", max_tokens=25, seed=choice["seed"])
        assert again["choices"][0]["text"] == choice["text"]


def test_several_stories_stream_side_by_side() -> None:
    backend, _ = paced(slots=3, step_seconds=0.005)
    with serving(backend) as running:
        with streaming(running, prompt="Once", n=3, max_tokens=30, seed=4) as flow:
            choices = [data["choices"][0] for _, data in flow if data != "[DONE]"]
        alone = whole(running, prompt="Once", n=3, max_tokens=30, seed=4)["choices"]
    order = [choice["index"] for choice in choices]
    assert {0, 1, 2} <= set(order[:9]), "none waits for another's end"
    received = ["".join(c["text"] for c in choices if c["index"] == index) for index in range(3)]
    assert received == [choice["text"] for choice in alone]
    assert [c["index"] for c in choices if c["finish_reason"]] != []
    assert sum(c["finish_reason"] == "length" for c in choices) == 3


def test_a_list_of_prompts_gives_the_stories_that_each_gives_alone(shipped: Running) -> None:
    prompts = ["A fox could not sleep.", "Mia found a key."]
    asked: dict[str, Any] = {"max_tokens": 12, "seed": 4, "n": 2, "echo": True}
    alone = [whole(shipped, prompt=prompt, **asked) for prompt in prompts]
    together = whole(shipped, prompt=prompts, **asked)
    texts = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert [choice["text"] for choice in together["choices"]] == texts
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    for name in together["usage"]:
        assert together["usage"][name] == sum(answer["usage"][name] for answer in alone)
    with streaming(shipped, prompt=prompts, **asked) as flow:
        choices = [data["choices"][0] for _, data in flow if data != "[DONE]"]
    assert ["".join(c["text"] for c in choices if c["index"] == index) for index in range(4)] == texts


def test_a_story_is_forked_at_any_token_by_an_array_of_tokens(shipped: Running) -> None:
    asked: dict[str, Any] = {"seed": 4, "return_token_ids": True}
    (story,) = whole(shipped, prompt="A fox", max_tokens=20, echo=True, logprobs=0, **asked)["choices"]
    prompt, tokens = story["prompt_token_ids"], story["token_ids"]
    assert whole(shipped, prompt=prompt, max_tokens=20, **asked)["choices"][0]["token_ids"] == tokens
    forks = [prompt + tokens[:at] for at in (1, 7)]
    (first, second) = whole(shipped, prompt=forks, max_tokens=13, echo=True, **asked)["choices"]
    assert first["text"].startswith("A fox")
    assert (first["prompt_token_ids"], second["prompt_token_ids"]) == tuple(forks)
    assert first["token_ids"] == tokens[1:14]
    assert second["token_ids"] == tokens[7:]
    assert second["text"] == story["text"]
    with streaming(shipped, prompt=forks, max_tokens=13, echo=True, **asked) as flow:
        choices = [data["choices"][0] for _, data in flow if data != "[DONE]"]
    for index, fork in enumerate((first, second)):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == fork["text"]
        assert own[0]["prompt_token_ids"] == fork["prompt_token_ids"]
    too_large = shipped.post("/v1/completions", prompt=[5, 4096])
    assert (too_large.status_code, too_large.json()["error"]["param"]) == (422, "prompt")
    assert shipped.figures()['story_streams_total{outcome="error"}'] == 0, "a bad input is no failure of the model"


def test_echo_with_log_probabilities_scores_the_prompt_as_it_was_generated(shipped: Running) -> None:
    asked: dict[str, Any] = {"temperature": 0, "logprobs": 2, "return_token_ids": True}
    (story,) = whole(shipped, prompt="A fox", max_tokens=20, echo=True, **asked)["choices"]
    table = story["logprobs"]
    assert "".join(table["tokens"]) == story["text"]
    assert (table["token_logprobs"][0], table["top_logprobs"][0], table["text_offset"][0]) == (None, None, 0)
    tokens = story["prompt_token_ids"] + story["token_ids"]
    for max_tokens in (0, 1):
        (scored,) = whole(shipped, prompt=tokens, max_tokens=max_tokens, echo=True, **asked)["choices"]
        again = scored["logprobs"]
        assert len(again["tokens"]) == len(tokens) + max_tokens
        assert again["tokens"][: len(tokens)] == table["tokens"]
        assert again["text_offset"][: len(tokens)] == table["text_offset"]
        for one, other in zip(again["token_logprobs"][1 : len(tokens)], table["token_logprobs"][1:], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    with streaming(shipped, prompt="A fox", max_tokens=20, echo=True, **asked) as flow:
        parts = [data["choices"][0]["logprobs"] for _, data in flow if data != "[DONE]"]
    for name, expected in table.items():
        assert [entry for part in parts if part is not None for entry in part[name]] == expected


def test_a_scored_story_ends_with_a_token_also_where_the_model_ends_it(shipped: Running) -> None:
    ended = whole(shipped, prompt="The sun was going down. Sam yawned and went home.", max_tokens=500, seed=1)
    prompt = "The sun was going down. Sam yawned and went home." + ended["choices"][0]["text"]
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0}
    (scored,) = whole(shipped, **asked, logit_bias={"0": 100})["choices"]
    assert (scored["finish_reason"], scored["text"]) == ("stop", prompt)
    assert scored["logprobs"]["tokens"][-1] == ""
    assert scored["logprobs"]["token_logprobs"][-1] <= 0
    (longer,) = whole(shipped, **asked, ignore_eos=True)["choices"]
    assert longer["finish_reason"] == "length"
    assert longer["logprobs"]["tokens"][:-1] == scored["logprobs"]["tokens"][:-1]


def test_biases_and_penalties_have_their_effect(shipped: Running) -> None:
    asked: dict[str, Any] = {"prompt": "A fox", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    (biased,) = whole(shipped, **asked, logit_bias={"300": 100})["choices"]
    assert biased["token_ids"] == [300] * 12
    (penalised,) = whole(shipped, **asked, logit_bias={"300": 25, "301": 24}, frequency_penalty=2)["choices"]
    assert {300, 301} <= set(penalised["token_ids"])
    (goes_on,) = whole(shipped, **asked, logit_bias={"0": 100}, min_tokens=5)["choices"]
    assert (goes_on["finish_reason"], len(goes_on["token_ids"])) == ("stop", 5)


def test_best_of_returns_the_likeliest_stories_of_each_prompt(shipped: Running) -> None:
    prompts = ["A fox could not sleep.", "Mia found a key."]
    asked: dict[str, Any] = {"prompt": prompts, "max_tokens": 20, "seed": 4}
    every = whole(shipped, **asked, n=4, logprobs=0)
    means = [sum(table) / len(table) for table in (c["logprobs"]["token_logprobs"] for c in every["choices"])]
    best = whole(shipped, **asked, best_of=4, n=2)
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    expected = [sorted(range(first, first + 4), key=lambda i: -means[i])[:2] for first in (0, 4)]
    texts = [every["choices"][index]["text"] for group in expected for index in group]
    assert [choice["text"] for choice in best["choices"]] == texts
    assert best["usage"] == every["usage"], "stories that are not returned were generated too"
    assert all(choice["logprobs"] is None for choice in best["choices"])


def test_more_stories_than_the_service_holds_are_refused_at_once() -> None:
    backend, _ = paced(slots=1, queue=1)
    with serving(backend) as running:
        response = running.post("/v1/completions", prompt=["a", "b", "c"])
    assert response.status_code == 422
    assert response.json()["error"]["message"] == "prompt asks for 3 stories at once; this service holds 2"


def test_a_stop_string_ends_the_story_and_is_no_part_of_it(shipped: Running) -> None:
    free = whole(shipped, prompt="Once upon a time", max_tokens=80, seed=1)["choices"][0]["text"]
    word = free.split()[10]
    for stop in (word, [word, "neverinastory"]):
        choice = whole(shipped, prompt="Once upon a time", max_tokens=80, seed=1, stop=stop)["choices"][0]
        assert choice["text"] == free[: free.index(word)]
        assert choice["finish_reason"] == "stop"


def test_echo_brings_the_prompt_back_whole_and_streamed(shipped: Running) -> None:
    asked: dict[str, Any] = {"prompt": "Tom had a kite.", "max_tokens": 5, "seed": 2, "n": 2}
    plain = whole(shipped, **asked)
    echoed = whole(shipped, **asked, echo=True)
    for one, other in zip(plain["choices"], echoed["choices"], strict=True):
        assert other["text"] == "Tom had a kite." + one["text"]
    with streaming(shipped, **asked, echo=True) as flow:
        choices = [data["choices"][0] for _, data in flow if data != "[DONE]"]
    for index in (0, 1):
        received = "".join(choice["text"] for choice in choices if choice["index"] == index)
        assert received == echoed["choices"][index]["text"]


def test_log_probabilities_are_the_same_whole_and_streamed_and_offsets_point_at_their_tokens(shipped: Running) -> None:
    asked: dict[str, Any] = {"prompt": "Lily had a", "max_tokens": 15, "seed": 6, "logprobs": 2}
    (choice,) = whole(shipped, **asked)["choices"]
    table = choice["logprobs"]
    assert "".join(table["tokens"]) == choice["text"]
    for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    for token, own, best in zip(table["tokens"], table["token_logprobs"], table["top_logprobs"], strict=True):
        assert best[token] == own <= 0
        assert 2 <= len(best) <= 3
    with streaming(shipped, **asked) as flow:
        parts = [data["choices"][0]["logprobs"] for _, data in flow if data != "[DONE]"]
    streamed = [part for part in parts if part is not None]
    for name, expected in table.items():
        assert [entry for part in streamed for entry in part[name]] == expected


def test_without_alternatives_each_tokens_own_log_probability_comes(shipped: Running) -> None:
    (choice,) = whole(shipped, prompt="Lily had a", max_tokens=4, seed=6, logprobs=0)["choices"]
    table = choice["logprobs"]
    assert [best[token] for token, best in zip(table["tokens"], table["top_logprobs"], strict=True)] == table[
        "token_logprobs"
    ]


def test_an_event_stream_says_that_nobody_may_gather_it(shipped: Running) -> None:
    body = {"prompt": "x", "max_tokens": 2, "stream": True}
    with shipped.client.stream("POST", "/v1/completions", json=body) as response:
        response.read()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-story-backend"] == "local"


class Permits(threading.Event):
    """A gate that lets one step through for each release."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        return self._permits.acquire(timeout=timeout)

    def release(self) -> None:
        self._permits.release()


def test_a_token_leaves_when_it_is_made_not_when_the_next_one_is() -> None:
    backend, network = paced()
    permits = Permits()
    network.gate = permits
    fox = {str(backend.engine.tokenizer.encode("fox")[0]): 100}  # each token has text then
    asked: dict[str, Any] = {"prompt": "Once", "max_tokens": 12, "logit_bias": fox, "return_token_ids": True}
    released, texts = time.time(), 0
    with serving(backend) as running, streaming(running, **asked) as flow:
        for _, data in flow:
            if data == "[DONE]" or "created_at" not in data:
                continue
            assert released <= data["created_at"] <= time.time(), "it is the time of the token"
            texts += 1
            assert sum(kind == "step" for kind, _ in network.calls) == texts - 1, "the next is not made yet"
            released = time.time()
            permits.release()
    assert texts == 12


def test_the_models_are_listed_and_found_by_name(shipped: Running) -> None:
    listed = shipped.client.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"]) == ("story-writer", "model")
    assert re.fullmatch(r"[0-9a-f]{64}", model["version"])
    assert shipped.client.get("/v1/models/story-writer").json() == model
    for name in ("gpt-4", "a/b", "%20"):
        response = shipped.client.get(f"/v1/models/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_another_model_is_not_silently_replaced(shipped: Running) -> None:
    response = shipped.post("/v1/completions", prompt="x", model="gpt-4")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "type": "invalid_request_error",
        "message": "model must be story-writer, got 'gpt-4'",
        "param": "model",
        "code": "model_not_found",
    }


def test_curl_reads_a_story_as_it_comes(shipped: Running) -> None:
    body = '{"prompt": "Once upon a time", "max_tokens": 10, "seed": 1, "stream": true}'
    command = ["curl", "-sN", "--fail", f"{shipped.url}/v1/completions", "-d", body]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert run.stdout.startswith("data: {")
    assert run.stdout.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("prompt", ["", "„Grüß dich“, sagte der Bär. 🦊", "a\u2028b\r\nc"])
def test_any_prompt_is_gone_on_from_and_comes_back_as_it_was(prompt: str, shipped: Running) -> None:
    answer = whole(shipped, prompt=prompt, max_tokens=4, seed=1, echo=True)
    assert answer["choices"][0]["text"].startswith(prompt)
    with streaming(shipped, prompt=prompt, max_tokens=4, seed=1, echo=True) as flow:
        received = "".join(data["choices"][0]["text"] for _, data in flow if data != "[DONE]")
    assert received == answer["choices"][0]["text"]


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
        received = "".join([chunk.choices[0].text async for chunk in stream])
        several = await asyncio.gather(*(client.completions.create(**ASKED) for _ in range(4)))  # type: ignore[call-overload]
    assert received == whole.choices[0].text
    assert {answer.choices[0].text for answer in several} == {received}


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
        model="story-writer", prompt="The sun was going down. Sam yawned and went home.", max_tokens=2000, seed=1
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
    with pytest.raises(openai.NotFoundError, match="there is nothing at /v1/embeddings"):
        client.embeddings.create(model="story-writer", input="x")


def test_a_full_queue_is_a_rate_limit_error_that_says_when_to_come_back() -> None:
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


def test_a_failure_in_mid_story_is_raised_not_sent() -> None:
    backend, network = paced()
    with serving(backend) as running, client_of(running) as client:
        network.gate.clear()
        stream = client.completions.create(model="story-writer", prompt="Once", max_tokens=50, stream=True, timeout=10)
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
