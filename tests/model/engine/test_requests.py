"""Requests beyond text in and text out: token prompts, penalties, scores of the prompt; and whole characters only."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.title import title_of
from model.errors import InputError
from model.generation import Completion, GenerationRequest, SamplingParams
from tests.model.engines import NO_END, TOKENIZER, by_hand, engine, outcome, request, runtime, whole_text
from tests.model.runtimes.shared import needs_native, small
from tests.model.small_model import small_tokenizer

SMALL = StoryTokenizer.load(small_tokenizer())
BYTE = {TOKENIZER.token_bytes(token): token for token in range(TOKENIZER.vocab_size)}


def tokens_of(running: Engine, asked: GenerationRequest) -> tuple[list[int], Completion]:
    stream = running.submit(asked)
    tokens = [token for chunk in stream for token in chunk.tokens]
    return tokens, stream.completion


# Token prompts


def test_the_tokens_of_a_text_are_the_same_prompt_with_and_without_the_start_of_the_story() -> None:
    text = request("Grüß dich", seed=4)
    tokens = tuple(TOKENIZER.encode("Grüß dich"))
    with engine() as e:
        expected = tokens_of(e, text)
        for prompt in (tokens, (0, *tokens)):
            found = tokens_of(e, replace(text, prompt=prompt))
            assert found[0] == expected[0]
            assert found[1].text == expected[1].text
            assert found[1].usage.prompt_tokens == len(prompt)


@needs_native
@settings(max_examples=25)
@given(
    text=st.sampled_from(["", "Once upon a time", "Zoë had a café"]),
    cut=st.integers(0, 39),
    seed=st.integers(0, 2**53),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    bias=st.lists(st.tuples(st.integers(1, 250), st.floats(-9, 9)), max_size=3, unique_by=lambda pair: pair[0]),
)
def test_a_story_forked_at_any_token_goes_on_with_the_same_bits(
    text: str, cut: int, seed: int, temperature: float, repetition_penalty: float, bias: list[tuple[int, float]]
) -> None:
    sampling = SamplingParams(
        seed=seed,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        ignore_eos=True,
        logit_bias=tuple(bias),
    )
    whole = GenerationRequest(prompt=text, max_tokens=40, sampling=sampling, logprobs=1)
    with Engine(small("native"), SMALL) as e:
        tokens, story = tokens_of(e, whole)
        prefix = (*SMALL.encode(title_of(text) + text), *tokens[:cut])
        left, fork = tokens_of(e, replace(whole, prompt=prefix, max_tokens=40 - cut, echo=True))
    assert left == tokens[cut:]
    assert fork.logprobs == story.logprobs[cut:]  # floats, equal to the last bit
    assert fork.prompt is not None
    assert fork.prompt.text + fork.text == title_of(text) + text + story.text


def test_a_prompt_that_ends_within_a_character_is_completed_and_the_text_begins_with_it() -> None:
    fox = [BYTE[bytes([byte])] for byte in "🦊".encode()]
    for cut in (1, 2, 3):
        prompt = (*TOKENIZER.encode("The "), *fox[:cut])
        with engine(runtime(**NO_END)) as e:
            for seed in range(5):
                asked = request("", seed=seed, max_tokens=20, echo=True)
                _, story = tokens_of(e, replace(asked, prompt=prompt))
                assert story.prompt is not None
                assert story.prompt.text == "The "
                assert ord(story.text[0]) >= 0x10000, "a character of four bytes"
                assert "\N{REPLACEMENT CHARACTER}" not in story.text


def test_ids_outside_the_vocabulary_are_refused_with_the_name_of_the_field() -> None:
    size = TOKENIZER.vocab_size
    with engine() as e:
        with pytest.raises(InputError, match=rf"prompt must hold token ids between 0 and {size - 1}, got {size}"):
            e.submit(GenerationRequest(prompt=(1, size)))
        with pytest.raises(InputError, match=f"logit_bias must hold token ids .* got {size + 5}"):
            e.submit(GenerationRequest(prompt="", sampling=SamplingParams(logit_bias=((size + 5, 1.0), (3, 1.0)))))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": (1, -2)}, "prompt must be text or token ids, got -2 among the ids"),
        ({"prompt": (1, True)}, "prompt must be text or token ids, got True among the ids"),
        ({"prompt": [1]}, "prompt must be text or token ids, got list"),
        ({"prompt": (1,) * 20_001}, "prompt must have at most 20000 tokens, got 20001"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be a whole number between 0 and 20, got 21"),
        ({"max_tokens": -1}, "max_tokens must be a whole number between 0 and 4096, got -1"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens must be at most max_tokens, 5"),
        ({"presence_penalty": 2.1}, "presence_penalty must be between -2 and 2, got 2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be between -2 and 2, got nan"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias must be between -100 and 100, got 101.0"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias must name each token once"),
        ({"logit_bias": tuple((i, 1.0) for i in range(1025))}, "logit_bias must name at most 1024 tokens, got 1025"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"keep_names": "no"}, "keep_names must be true or false, got 'no'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(wrong: dict[str, Any], message: str) -> None:
    names = SamplingParams.__dataclass_fields__.keys()
    with pytest.raises(InputError, match=re.escape(message)):
        GenerationRequest(
            **{"prompt": ""} | {name: value for name, value in wrong.items() if name not in names},
            sampling=SamplingParams(**{name: value for name, value in wrong.items() if name in names}),
        )


# The end of a story


@pytest.mark.parametrize("seed", range(5))
def test_a_story_that_ignores_its_end_has_all_its_tokens_and_none_of_them_is_the_end(seed: int) -> None:
    eager = runtime(end_bias=8.0)
    asked = request(seed=seed, max_tokens=50)
    with engine(eager) as e:
        usual, _ = tokens_of(e, asked)
        tokens, story = tokens_of(e, replace(asked, sampling=replace(asked.sampling, ignore_eos=True)))
    assert len(usual) < 50
    assert (len(tokens), story.finish_reason) == (50, "length")
    assert 0 not in tokens


@pytest.mark.parametrize("least", [1, 7, 20])
def test_no_story_ends_before_its_least_number_of_tokens_and_most_soon_after(least: int) -> None:
    with engine(runtime(end_bias=1000.0)) as e:
        for seed in range(5):
            asked = request(seed=seed, max_tokens=60)
            tokens, story = tokens_of(e, replace(asked, sampling=replace(asked.sampling, min_tokens=least)))
            assert story.finish_reason == "stop"
            # The end comes as soon as it may; within a character it may not.
            assert least <= len(tokens) <= least + 3
            assert outcome(story, tuple(tokens)) == by_hand(
                replace(asked, sampling=replace(asked.sampling, min_tokens=least)), runtime(end_bias=1000.0)
            )


def test_a_stop_string_is_looked_for_after_the_least_number_of_tokens() -> None:
    with engine(runtime(**NO_END)) as e:
        asked = request(seed=2, max_tokens=40)
        tokens, free = tokens_of(e, asked)
        common = min(set(free.text), key=free.text.index)
        later = replace(asked, stop=(common,), sampling=replace(asked.sampling, min_tokens=30))
        _, story = tokens_of(e, later)
    before = TOKENIZER.decode(tokens[:30]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert story.text == free.text[: free.text.find(common, len(before))] or story.text == free.text
    assert story.text.startswith(before)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 1.0, 2.0]), prompt=st.sampled_from(["", "Grüß", "🦊"])
)
def test_no_story_holds_half_a_character(seed: int, temperature: float, prompt: str) -> None:
    """The network is random and often begins a character that it would not go on with."""
    with engine(runtime(sharpness=0.5)) as e:
        stream = e.submit(request(prompt, seed=seed, temperature=temperature, max_tokens=60))
        story = stream.wait(20)
    assert "\N{REPLACEMENT CHARACTER}" not in story.text
    data = b"".join(TOKENIZER.token_bytes(token) for token in stream.tokens)
    if story.finish_reason == "stop":
        assert data.decode() == story.text
    else:  # cut by max_tokens: at most the last character is missing
        assert data.startswith(story.text.encode())
        assert len(data) - len(story.text.encode()) <= 3


# Penalties and biases


def test_a_biased_token_comes_always_or_never() -> None:
    fox = TOKENIZER.encode("fox")[0]
    with engine(runtime(**NO_END)) as e:
        asked = request(seed=1, max_tokens=20)
        always, _ = tokens_of(e, replace(asked, sampling=replace(asked.sampling, logit_bias=((fox, 100.0),))))
        free, _ = tokens_of(e, asked)
        never = tuple((token, -100.0) for token in set(free))
        other, _ = tokens_of(e, replace(asked, sampling=replace(asked.sampling, logit_bias=never)))
    assert always == [fox] * 20
    assert not set(other) & set(free)


def test_a_presence_penalty_counts_what_was_generated_and_not_the_prompt() -> None:
    fox, ball = TOKENIZER.encode("fox")[0], TOKENIZER.encode(" tree")[0]
    bias = ((fox, 60.0), (ball, 59.0))
    with engine(runtime(**NO_END, sharpness=0.01)) as e:
        asked = GenerationRequest(
            prompt=(fox, fox), max_tokens=4, sampling=SamplingParams(temperature=0, logit_bias=bias, presence_penalty=2)
        )
        present, _ = tokens_of(e, asked)
        frequent, _ = tokens_of(
            e, replace(asked, sampling=replace(asked.sampling, presence_penalty=0.0, frequency_penalty=1.5))
        )
    assert present == [fox, ball, fox, fox]  # 60, 58 | 59; then both have their two points off: 58, 57
    assert frequent == [fox, ball, fox, ball]  # 60 | 58.5, 59 | 58.5, 57.5 | 57, 57.5


# Scores of the prompt


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("prompt", ["Once upon a time there was a fox. " * 3, (0, 5, 9, 260), (7,), ()])
def test_prompt_log_probabilities_are_those_of_the_softmax_behind_each_token(
    prompt: str | tuple[int, ...], max_tokens: int
) -> None:
    asked = replace(request("", max_tokens=max_tokens), prompt=prompt, prompt_logprobs=2)
    with engine(runtime(**NO_END)) as e:
        stream = e.submit(asked)
        first = next(stream)
        story = stream.wait(10)
        tokens, plain = tokens_of(e, replace(asked, prompt_logprobs=None))
    assert (story.text, list(stream.tokens)) == (plain.text, tokens)  # asking changes nothing
    assert story.finish_reason == "length"
    echo = first.prompt
    assert echo == story.prompt
    assert echo is not None
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else list(prompt)
    assert list(echo.tokens) == ids
    assert echo.text == whole_text(ids)
    assert echo.token_texts == tuple(TOKENIZER.decode([token]) for token in ids)
    assert len(echo.logprobs) == len(ids)
    assert [entry is None for entry in echo.logprobs] == [place == 0 for place in range(len(ids))]
    network = runtime(**NO_END)
    story_ids = ids if ids[:1] == [0] else [0, *ids]
    offset = len(story_ids) - len(ids)
    for place, entry in enumerate(echo.logprobs[1:], 1):
        assert entry is not None
        logits = network.prefill(story_ids[: place + offset])[0].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert entry.token == ids[place]
        assert entry.logprob == pytest.approx(expected[ids[place]], abs=1e-6)
        assert [token for token, _, _ in entry.alternatives] == np.argsort(-expected, kind="stable")[:2].tolist()


@pytest.mark.parametrize("name", [pytest.param("native", marks=needs_native), "fp32", "torch"])
def test_every_runtime_scores_a_prompt_as_it_scores_the_same_story_while_generating(name: str) -> None:
    sampling = SamplingParams(seed=3, ignore_eos=True)
    with Engine(small(name), SMALL) as e:
        asked = GenerationRequest(prompt="Once", max_tokens=90, sampling=sampling, logprobs=0)
        tokens, story = tokens_of(e, asked)
        prompt = (*SMALL.encode("Once"), *tokens)
        scored = tokens_of(e, replace(asked, prompt=prompt, max_tokens=0, logprobs=None, prompt_logprobs=0))[1].prompt
    assert scored is not None
    found = [entry.logprob for entry in scored.logprobs[-90:] if entry is not None]
    assert found == pytest.approx([entry.logprob for entry in story.logprobs], abs=1e-3 if name != "native" else 0)


def test_a_start_of_a_story_within_a_prompt_forgets_what_was_before() -> None:
    with Engine(small("fp32"), SMALL) as e:
        asked = GenerationRequest(prompt=(9, 8, 0, 7, 6, 5), max_tokens=0, prompt_logprobs=0)
        both = e.submit(asked).wait(10).prompt
        alone = e.submit(replace(asked, prompt=(0, 7, 6, 5))).wait(10).prompt
    assert both is not None
    assert alone is not None
    assert both.logprobs[3:] == alone.logprobs[1:]
