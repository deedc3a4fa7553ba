"""A story with wishes is drawn until one meets them: compared with stories that are generated one by one, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.engine import Engine
from model.engine.stream import Stream
from model.engine.title import title_of
from model.errors import InputError
from model.generation import Completion, GenerationRequest, choice_seed
from model.wishes import DRAWS, Wishes
from tests.model.engines import TOKENIZER, by_hand, engine, request, runtime

SHORT_STORIES = {"end_bias": 2.0}
"""So that stories end by themselves, after one to thirty tokens."""


def drawn_by_hand(asked: GenerationRequest, **options: float) -> tuple[int, list[int], str, str]:
    """(wishes not met, tokens, text, finish reason) of the best of all draws, each generated without an engine."""
    assert isinstance(asked.prompt, str)
    title = title_of(asked.prompt, asked.wishes.words)
    prompt = (0, *TOKENIZER.encode(title + asked.prompt))
    draws = []
    for number in range(DRAWS):
        sampling = replace(asked.sampling, seed=choice_seed(asked.sampling.seed, number))
        one = replace(asked, prompt=prompt[1:], sampling=sampling, wishes=Wishes())
        tokens, text, reason = by_hand(one, runtime(**options))
        draws.append((asked.wishes.unmet(asked.prompt + text), tokens, text, reason))
    return min(draws, key=lambda draw: draw[0])  # the first of several


def streamed(e: Engine, asked: GenerationRequest) -> tuple[Stream, str]:
    stream = e.submit(asked)
    return stream, "".join(chunk.text for chunk in stream)


@settings(max_examples=25)
@given(
    prompt=st.sampled_from(["", "Once upon a time", "Grüß dich, said Tom"]),
    seed=st.integers(0, 2**40),
    words=st.lists(st.sampled_from(["fox", "oak", "Bär", "zebra"]), max_size=2, unique=True).map(tuple),
    dialogue=st.sampled_from([None, True]),
    stop=st.sampled_from([(), ("tree",)]),
)
def test_the_story_is_the_first_of_its_draws_that_meets_most(
    prompt: str, seed: int, words: tuple[str, ...], dialogue: bool | None, stop: tuple[str, ...]
) -> None:
    asked = request(prompt, seed=seed, wishes=Wishes(words=words, dialogue=dialogue), stop=stop)
    unmet, tokens, text, reason = drawn_by_hand(asked, **SHORT_STORIES)
    with engine(runtime(**SHORT_STORIES)) as e:
        stream, shown = streamed(e, asked)
        ended: Completion = stream.completion
        assert (list(stream.tokens), ended.text, ended.finish_reason) == (tokens, text, reason)
        assert shown == text
        assert asked.wishes.unmet(prompt + text) == unmet
        assert ended.usage.completion_tokens == len(tokens)
        assert 0 < ended.usage.ttft <= ended.usage.duration
        # As tokens behind the line that was read before it, the same story comes: so a link reopens it.
        if prompt and not stop:
            title = title_of(prompt, words)
            again, _ = streamed(e, replace(asked, prompt=(0, *TOKENIZER.encode(title + prompt))))
            assert again.tokens == stream.tokens


def test_draws_change_no_other_story_and_need_no_slot_of_their_own() -> None:
    wished = request("Once upon", seed=3, wishes=Wishes(words=("zebra",)))
    plain = [request(f"Once {number}", seed=number) for number in range(6)]
    with engine(runtime(**SHORT_STORIES), slots=2) as e:
        streams = [e.submit(each) for each in (plain[0], wished, *plain[1:], wished)]
        found = [stream.wait(60).text for stream in streams]
    expected = [by_hand(each, runtime(**SHORT_STORIES))[1] for each in plain]
    wish = drawn_by_hand(wished, **SHORT_STORIES)[2]
    assert found == [expected[0], wish, *expected[1:], wish]


def test_nothing_is_sent_before_a_story_is_taken_and_a_cancelled_one_ends_at_once() -> None:
    # Never ends by itself and has no zebra: every draw goes to its last token.
    asked = request("Once upon", max_tokens=4_000, wishes=Wishes(words=("zebra",)))
    with engine(runtime(end_bias=-1000.0)) as e:
        stream = e.submit(asked)
        while e.stats().tokens < 50:
            pass
        stream.cancel()
        assert stream.wait(60).finish_reason == "cancelled"
        assert e.stats().active == 0


def test_a_story_that_is_lost_is_given_up_and_the_last_draw_is_not() -> None:
    # All draws speak: the last one is written to its end, and taken.
    asked = request('"Oh', max_tokens=30, wishes=Wishes(dialogue=False))
    with engine(runtime(end_bias=-1000.0)) as e:
        ended = e.submit(asked).wait(60)
        assert ended.usage.completion_tokens == 30
        assert e.stats().tokens < 30 * DRAWS


def test_draws_have_so_many_tokens_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.stream.DRAWN_TOKENS", 60)
    with engine(runtime(end_bias=-1000.0)) as e:
        e.submit(request(max_tokens=29, wishes=Wishes(words=("zebra",)))).wait(60)
        assert e.stats().tokens == 4 * 29


def test_a_request_without_tokens_draws_none() -> None:
    with engine() as e:
        assert e.submit(request(max_tokens=0, echo=True, wishes=Wishes(words=("fox",)))).wait(60).text == ""
        assert e.stats().tokens == 0


def test_a_scored_prompt_has_no_wishes() -> None:
    with pytest.raises(InputError, match="wishes cannot be had together with log-probabilities of the prompt"):
        GenerationRequest(prompt="Once", wishes=Wishes(ending="sad"), prompt_logprobs=1)
