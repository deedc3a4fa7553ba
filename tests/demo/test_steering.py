"""Steering: words out of tokens, what else could stand at a place, and where a story could go."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.steering import Branch, Caller, Word, alternatives, futures, merge, words_of
from model.errors import LimitError
from model.generation import GenerationRequest, SamplingParams, TokenLogprob, choice_seed
from model.serving.backend import LocalBackend
from model.serving.rate_limit import Limiter, quotas_of
from model.serving.session import GenerationManager
from model.settings import Settings
from tests.demo.engines import local_backend, tokenizer

TEXT = "One day, Lily didn't see the fox's key: \"Oh!\" 🦊 süß\nThen 3 came."


def tokens_of(text: str) -> list[TokenLogprob]:
    ids = tokenizer().encode(text)
    return [TokenLogprob(token, tokenizer().decode([token]), -0.5) for token in ids]


def test_words_are_what_a_reader_takes_for_them() -> None:
    words = words_of(tokens_of(TEXT), TEXT)
    assert [word.text for word in words][:8] == ["One", " day", ",", " Lily", " didn't", " see", " the", " fox's"]
    assert [word.text for word in words][-4:] == ["\nThen", " 3", " came", "."]
    assert " 🦊" in [word.text for word in words]


@given(st.text("abé 🦊ü'.,\n3", max_size=30))
def test_words_are_the_text_and_its_tokens_whatever_they_are(text: str) -> None:
    tokens = tokens_of(text)
    words = words_of(tokens, text)
    assert "".join(word.text for word in words) == text
    assert [token for word in words for token in word.tokens] == [token.token for token in tokens]
    assert math.isclose(sum(word.bits for word in words), 0.5 / math.log(2) * len(tokens), abs_tol=1e-9)


async def test_an_alternative_has_the_probability_that_scoring_its_tokens_gives() -> None:
    shipped = LocalBackend.load(Settings(story_slots=8))
    prompt = (0, *shipped.engine.tokenizer.encode("Once upon a time there was a little"))
    manager = GenerationManager(shipped)
    async with shipped.running():
        found = await alternatives(manager, GenerationRequest(prompt=prompt), Caller("me"))
        assert [each.probability for each in found] == sorted((each.probability for each in found), reverse=True)
        assert {" girl", " boy"} < {each.text for each in found}
        for each in found:
            whole = (*prompt, *each.tokens)
            scored = shipped.engine.submit(
                GenerationRequest(prompt=whole, max_tokens=0, prompt_logprobs=0, logprobs=0, echo=True)
            ).wait()
            assert scored.prompt is not None
            entries = scored.prompt.logprobs[len(prompt) :]
            total = sum(entry.logprob for entry in entries if entry is not None)
            assert math.isclose(total, math.log(each.probability), abs_tol=2e-3)
            assert "".join(scored.prompt.token_texts[len(prompt) :]) == each.text
        ended = (0, *shipped.engine.tokenizer.encode("They were happy and went home. The end."))
        found = await alternatives(manager, GenerationRequest(prompt=ended), Caller("me"))
    assert (found[0].text, found[0].tokens) == ("", ())


async def test_futures_are_those_of_n_choices() -> None:
    backend = local_backend(slots=8, queue=16)
    prompt = (0, *tokenizer().encode("One"))
    request = GenerationRequest(prompt=prompt, sampling=SamplingParams(seed=5, temperature=0.3))
    async with backend.running():
        found = await futures(GenerationManager(backend), request, Caller("me"), 6)
        texts = []
        for number in range(6):
            sampling = SamplingParams(seed=choice_seed(5, number), temperature=0.3)
            stream = backend.engine.submit(GenerationRequest(prompt=prompt, max_tokens=40, sampling=sampling))
            texts.append(stream.wait().text)
    assert sorted(unmerged(found)) == sorted(text for text in texts if text)
    assert sum(branch.count for branch in found) == len([text for text in texts if text])


WORDS = st.sampled_from([Word(letter, (token,), 1.0) for letter, token in (("a", 1), ("a", 2), ("b", 3), ("c", 4))])


@given(st.lists(st.lists(WORDS, max_size=5), max_size=8))
def test_merged_stories_can_be_taken_apart_again(stories: list[list[Word]]) -> None:
    merged = merge(stories)
    assert sorted(unmerged(merged)) == sorted("".join(word.text for word in story) for story in stories if story)
    assert [branch.count for branch in merged] == sorted((branch.count for branch in merged), reverse=True)
    assert len({branch.words[0].text for branch in merged}) == len(merged)


def unmerged(branches: list[Branch], before: str = "") -> list[str]:
    found = []
    for branch in branches:
        text = before + "".join(word.text for word in branch.words)
        below = unmerged(branch.branches, text)
        found += [*below, *[text] * (branch.count - len(below))]
    return found


async def test_a_look_counts_as_one_story_for_the_rate_limits() -> None:
    backend = local_backend(slots=8, queue=16)
    manager = GenerationManager(backend, limiter=Limiter(quotas_of("2/minute", "client", "stories")))
    request = GenerationRequest(prompt=(0, *tokenizer().encode("One")))
    async with backend.running():
        assert len(await alternatives(manager, request, Caller("me"))) > 1
        assert await futures(manager, request, Caller("me"), 4)
        with pytest.raises(LimitError):
            await alternatives(manager, request, Caller("me"))
        assert await alternatives(manager, request, Caller("another"))
