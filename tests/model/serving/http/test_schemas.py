"""What a client may send: every field, every message, and whatever else may come."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.generation import GenerationRequest, SamplingParams, choice_seed
from model.serving.http.response import ServiceError, as_service_error
from model.serving.http.schemas import (
    MAX_CHOICES,
    MAX_STREAMS,
    CompletionBody,
    SimpleBody,
    apply_cache_control,
    parse_object,
)
from model.wishes import Wishes


def requests(**body: Any) -> list[GenerationRequest]:
    return CompletionBody.read(body).requests()


def test_a_prompt_alone_asks_for_one_story_with_the_default_parameters() -> None:
    (request,) = requests(prompt="Once")
    seed = request.sampling.seed
    assert request == GenerationRequest(prompt="Once", sampling=SamplingParams(seed=seed), cacheable=False)
    assert requests(prompt="Once")[0].user != request.user, "nobody known is somebody new each time"
    assert requests(prompt="Once", user="lily")[0].user == "lily"
    assert requests(prompt="Once")[0].sampling.seed != seed, "a new seed for each request without one"


def test_every_setting_reaches_the_request() -> None:
    asked = requests(
        model="story-writer",
        prompt=["Once"],
        max_tokens=7,
        temperature=0.25,
        top_p=0.5,
        top_k=9,
        min_p=0.125,
        repetition_penalty=1.5,
        seed=11,
        stop=["The end", "."],
        logprobs=3,
        user="someone",
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"7": 1.5, "3": -100},
        ignore_eos=True,
        keep_names=False,
        min_tokens=4,
        wishes={"words": ["fox"], "dialogue": False, "ending": "sad"},
        best_of=1,
    )
    sampling = SamplingParams(
        temperature=0.25,
        top_p=0.5,
        top_k=9,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias=((3, -100), (7, 1.5)),
        ignore_eos=True,
        keep_names=False,
        min_tokens=4,
        seed=11,
    )
    assert asked == [
        GenerationRequest(
            prompt="Once",
            max_tokens=7,
            sampling=sampling,
            wishes=Wishes(words=("fox",), dialogue=False, ending="sad"),
            stop=("The end", "."),
            logprobs=3,
        )
    ]
    assert requests(prompt="x", stop="end")[0].stop == ("end",)


def test_each_of_several_stories_has_a_seed_of_its_own_and_the_first_the_requests() -> None:
    seeds = [request.sampling.seed for request in requests(prompt="x", n=MAX_CHOICES, seed=5)]
    assert seeds[0] == 5
    assert len(set(seeds)) == MAX_CHOICES
    assert seeds == [request.sampling.seed for request in requests(prompt="x", n=MAX_CHOICES, seed=5)]


@given(seed=st.integers(0, 2**63 - 1), index=st.integers(0, 7))
def test_a_derived_seed_is_one_that_can_be_asked_for(seed: int, index: int) -> None:
    derived = choice_seed(seed, index)
    assert SamplingParams(seed=derived).seed == derived
    assert derived == seed or derived < 2**53, "exact in JavaScript's numbers"


def test_each_prompt_of_a_list_has_its_stories_in_order_and_the_seeds_it_has_alone() -> None:
    several = requests(prompt=["a", "b"], n=2, seed=5)
    assert several == [*requests(prompt="a", n=2, seed=5), *requests(prompt="b", n=2, seed=5)]
    assert len({request.sampling.seed for request in requests(prompt=["a"] * 8)}) == 8, "without a seed, one each"


def test_token_arrays_are_prompts_as_they_are() -> None:
    assert [request.prompt for request in requests(prompt=[5, 6])] == [(5, 6)]
    assert [request.prompt for request in requests(prompt=[[5, 6], [7]], n=2)] == [(5, 6), (5, 6), (7,), (7,)]


def test_the_prompt_is_scored_where_echo_and_log_probabilities_are_asked_for() -> None:
    (request,) = requests(prompt="x", echo=True, logprobs=2, max_tokens=0)
    assert (request.echo, request.prompt_logprobs, request.logprobs, request.max_tokens) == (True, 2, 2, 0)
    (request,) = requests(prompt="x", logprobs=2)
    assert (request.echo, request.prompt_logprobs, request.logprobs) == (False, None, 2)
    assert not requests(prompt="x", echo=True)[0].echo, "a text is known without the engine"
    assert requests(prompt=[5], echo=True)[0].echo


def test_programs_without_integers_send_floats_and_minus_one_is_off_or_random() -> None:
    (request,) = requests(prompt="x", max_tokens=7.0, top_k=9.0, seed=3.0, n=1.0, logprobs=2.0)
    assert (request.max_tokens, request.sampling.top_k, request.sampling.seed, request.logprobs) == (7, 9, 3, 2)
    first, second = (requests(prompt="x", top_k=-1, seed=-1)[0] for _ in range(2))
    assert first.sampling.top_k == 0
    assert not first.cacheable
    assert first.sampling.seed != second.sampling.seed


def test_harmless_fields_of_the_contract_are_accepted_and_ignored() -> None:
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": True}
    harmless: dict[str, Any] = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "x"}
    body = {"prompt": "x", "seed": 1, "stream": True}
    assert requests(**body, **harmless, stream_options=options) == requests(**body)


@pytest.mark.parametrize("body", [CompletionBody, SimpleBody])
def test_the_described_bounds_are_those_that_are_checked(body: Any) -> None:
    fields = body.model_json_schema()["properties"]
    bounded = {name for name, field in fields.items() if {"minimum", "exclusiveMinimum"} & field.keys()}
    assert bounded >= {"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"}
    for name in bounded - {"min_tokens"}:  # whose upper bound is max_tokens
        field = fields[name]
        low = field.get("minimum", field.get("exclusiveMinimum"))
        for value in (low, field["maximum"]):
            if "minimum" in field or value != low:
                assert _asked(body, value, name)
        below = low if "exclusiveMinimum" in field else low - 1
        for value in (below, field["maximum"] + 1):
            with pytest.raises((ServiceError, InputError)):
                _asked(body, value, name)


def _asked(body: Any, value: Any, name: str) -> list[GenerationRequest]:
    asked: list[GenerationRequest] = body.read(
        {"prompt": "x", "echo": True, name: value} if body is CompletionBody else {"prompt": "x", name: value}
    ).requests()
    return asked


def test_null_counts_as_not_given() -> None:
    names = [name for name in CompletionBody.model_fields if name != "prompt"]
    body = dict.fromkeys([*names, "a_field_of_tomorrow"], None) | {"prompt": "x", "seed": 1}
    assert requests(**body) == requests(prompt="x", seed=1)


NUMBER = "must be a number between 0 and 2"
WRONG = [
    ({}, "prompt", "must be given: a text, a list of texts, a list of token ids or a list of such lists"),
    ({"prompt": None}, "prompt", "must be given: "),
    ({"prompt": 5}, "prompt", "must be a text, a list of texts, a list of token ids or a list of such lists, got 5"),
    ({"prompt": [1, "a"]}, "prompt", "or a list of such lists, got [1, 'a']"),
    ({"prompt": [-1]}, "prompt", "must be text or token ids, got -1 among the ids"),
    ({"prompt": [True]}, "prompt", "or a list of such lists, got [True]"),
    ({"prompt": [[1], [0.5]]}, "prompt", "or a list of such lists, got [[1], [0.5]]"),
    ({"prompt": []}, "prompt", "must be a text, a list of texts, a list of token ids or a list of such lists, got []"),
    ({"prompt": ["a"] * 9, "n": 8}, "prompt", "asks for 72 stories: 9 prompts, 8 each; a request has at most 64"),
    ({"prompt": "x" * 20_001}, "prompt", "must have at most 20000 characters, got 20001"),
    ({"prompt": "\ud800"}, "prompt", "holds half a character (a lone surrogate) at 0"),
    ({"max_tokens": -1}, "max_tokens", "must be a whole number between 0 and 4096, got -1"),
    ({"max_tokens": "9"}, "max_tokens", "must be a whole number between 0 and 4096, the longest story, got '9'"),
    ({"max_tokens": 2.5}, "max_tokens", "must be a whole number between 0 and 4096, the longest story, got 2.5"),
    ({"temperature": 7}, "temperature", "must be between 0 and 2, got 7"),
    ({"temperature": "hot"}, "temperature", f"{NUMBER}, got 'hot'"),
    ({"temperature": True}, "temperature", f"{NUMBER}, got True"),
    ({"temperature": float("nan")}, "temperature", "must be between 0 and 2, got nan"),
    ({"top_p": 0}, "top_p", "must be above 0 and at most 1, got 0"),
    ({"top_k": -2}, "top_k", "must be a whole number between 0 and 1000000, got -2"),
    ({"min_p": 1.5}, "min_p", "must be between 0 and 1, got 1.5"),
    ({"repetition_penalty": 3}, "repetition_penalty", "must be between 1 and 2, got 3"),
    ({"seed": -2}, "seed", f"must be a whole number between 0 and {2**63 - 1}, got -2"),
    ({"seed": 2**63}, "seed", f"must be a whole number between 0 and {2**63 - 1}, got {2**63}"),
    ({"n": 9}, "n", "must be a whole number between 1 and 8, how many stories, got 9"),
    ({"n": 0}, "n", "must be a whole number between 1 and 8, how many stories, got 0"),
    ({"stop": ["a"] * 9}, "stop", "must be at most 8 texts of 1 to 200 characters each"),
    ({"stop": ""}, "stop", "must be at most 8 texts of 1 to 200 characters each"),
    ({"stop": [1]}, "stop", "must be a text or a list of at most 8 texts, got [1]"),
    ({"logprobs": 21}, "logprobs", "must be a whole number between 0 and 20, got 21"),
    ({"logprobs": True}, "logprobs", "must be a whole number between 0 and 20, got True"),
    ({"stream": "yes"}, "stream", "must be true or false, got 'yes'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "may be given only where stream is true"),
    ({"stream_options": {"usage": 1}}, "stream_options", "must be an object with include_usage, include_"),
    ({"presence_penalty": 2.5}, "presence_penalty", "must be between -2 and 2, got 2.5"),
    ({"frequency_penalty": -3}, "frequency_penalty", "must be between -2 and 2, got -3"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "must be at most max_tokens, 8"),
    ({"ignore_eos": 1}, "ignore_eos", "must be true or false, whether the story goes on to max_tokens, got 1"),
    ({"best_of": 1, "n": 2}, "best_of", "must be a whole number between n and 8: how many stories are generated"),
    ({"best_of": 3, "stream": True}, "best_of", "not with stream; got 3 with n 1"),
    ({"best_of": 9}, "best_of", "not with stream, got 9"),
    ({"suffix": "end"}, "suffix", "must be empty: this model only goes on from a beginning, got 'end'"),
    ({"logit_bias": {"fox": 1}}, "logit_bias", "must be an object of at most 1024 token ids, each with a number"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "must be between -100 and 100, got 101"),
    ({"logit_bias": [5]}, "logit_bias", "must be an object of at most 1024 token ids"),
    ({"temprature": 1}, "temprature", "is not known; the nearest is temperature"),
    ({"\ud800": 1}, "\ud800", r"\ud800 is not known; the nearest is "),
    ({"\n": 1}, "\n", r"\n is not known; the nearest is "),
]


@pytest.mark.parametrize(("body", "param", "message"), WRONG)
def test_a_wrong_field_is_named_with_what_is_allowed(body: dict[str, Any], param: str, message: str) -> None:
    if "prompt" not in body and body:
        body = {"prompt": "x", **body}
    with pytest.raises((ServiceError, InputError)) as caught:
        CompletionBody.read(body).requests()
    answer = as_service_error(caught.value)
    assert (answer.status, answer.param, answer.code) == (422, param, "invalid_value")
    assert message in str(answer)
    assert str(answer).startswith(f"{param} ") or not param.isprintable()
    assert "\n" not in str(answer)


def test_a_long_wrong_value_is_not_repeated_whole() -> None:
    with pytest.raises(ServiceError) as caught:
        CompletionBody.read({"prompt": "x", "temperature": "h" * 50_000})
    assert len(str(caught.value)) < 200


def test_the_simple_form_knows_no_field_of_the_other() -> None:
    assert SimpleBody.read({"prompt": "x", "seed": 1}).requests() == requests(prompt="x", seed=1)
    with pytest.raises(ServiceError, match="n is not known"):
        SimpleBody.read({"prompt": "x", "n": 2})
    with pytest.raises(ServiceError, match="prompt must be text, the story's beginning, got \\['x'\\]"):
        SimpleBody.read({"prompt": ["x"]})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b"null"]
)
def test_what_is_no_json_object_is_reported(body: bytes) -> None:
    with pytest.raises(ServiceError, match=r"^the body ") as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert "\n" not in str(caught.value)


def test_a_value_that_nests_as_deep_as_can_be_read_is_named_all_the_same() -> None:
    for depth in range(100, 2000, 50):
        body = b'{"prompt": "x", "temperature": ' + b"[" * depth + b"]" * depth + b"}"
        with pytest.raises(ServiceError):
            CompletionBody.read(parse_object(body))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BODIES = st.dictionaries(
    st.sampled_from([*CompletionBody.model_fields]) | st.text(max_size=8), VALUES, max_size=5
) | st.dictionaries(st.sampled_from([*CompletionBody.model_fields]), VALUES, max_size=3).map(
    lambda body: {"prompt": "x", **body}
)


@given(body=BODIES)
def test_any_body_is_either_stories_or_an_error_that_names_a_field(body: dict[str, Any]) -> None:
    try:
        asked = CompletionBody.read(parse_object(json.dumps(body).encode())).requests()
    except (ServiceError, InputError) as error:
        answer = as_service_error(error)
        assert answer.status == (404 if answer.code == "model_not_found" else 422)
        assert answer.param is not None
        assert answer.response().body
    else:
        assert 1 <= len(asked) <= MAX_STREAMS


@pytest.mark.parametrize(
    ("body", "cacheable"),
    [({}, False), ({"seed": 0}, True), ({"temperature": 0}, True), ({"temperature": 0.0, "seed": 3}, True)],
)
def test_only_a_story_that_comes_out_the_same_again_may_be_remembered(body: Any, cacheable: bool) -> None:
    (request,) = requests(prompt="Once", **body)
    assert request.cacheable is cacheable


@pytest.mark.parametrize(
    ("header", "cacheable"), [("", True), ("max-age=5", True), ("no-cache", False), ("max-age=0, No-Store", False)]
)
def test_a_client_can_ask_for_a_story_that_is_written_anew(header: str, cacheable: bool) -> None:
    (request,) = apply_cache_control(requests(prompt="Once", seed=1), {"cache-control": header})
    assert request.cacheable is cacheable
