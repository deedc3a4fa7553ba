"""What the page Inside shows, each figure computed a second way: by generating, by scoring, or from the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest

from demo import inside_handlers
from demo.handlers import AppState
from demo.inside_handlers import EVIDENCE_WORDS, LONGEST, Place, answer, distribution, evidence, memory, read
from demo.steering import Caller, words_of
from experiments.interpret.trace import trace_story
from model.architecture.folder import PRETRAINED
from model.architecture.network import load_network
from model.architecture.tokenizer import StoryTokenizer
from model.errors import InputError, StoryError
from model.generation import MAX_LOGPROBS, GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend, Stream
from model.serving.rate_limit import Limiter, quotas_of
from model.serving.session import GenerationManager
from model.settings import Settings
from tests.demo.engines import local_backend

ME = Caller("me")
TEXT = 'Tom had a red kite. Tim had a blue ball. "Look!" said Tom. He ran with his kite.'


@pytest.fixture(scope="module")
def shipped() -> Iterator[LocalBackend]:
    backend = LocalBackend.load(Settings(story_slots=8))
    with backend.engine:
        yield backend


@pytest.fixture
def backend(shipped: LocalBackend) -> LocalBackend:
    """One of its own, over the same engine."""
    return LocalBackend(shipped.engine, shipped.model, capacity=shipped.capacity)


@pytest.fixture
def manager(backend: LocalBackend) -> GenerationManager:
    return GenerationManager(backend)


async def place_of(manager: GenerationManager, text: str, word: str) -> Place:
    """The last place of a word in a text."""
    words = await read(manager, text, (), ME)
    number = max(at for at, each in enumerate(words) if each.text == word)
    return Place.of([each.tokens for each in words], number)


async def test_words_cost_what_they_did_when_they_were_generated(manager: GenerationManager) -> None:
    sampling = SamplingParams(seed=3, keep_names=False)
    request = GenerationRequest(prompt=TEXT, max_tokens=60, sampling=sampling, logprobs=0)
    async with manager.session([request]) as session:
        async for _ in session.events(5):
            pass
    (story,) = session.completions
    generated = words_of(story.logprobs, story.text)
    words = await read(manager, TEXT, [entry.token for entry in story.logprobs], ME)
    assert "".join(word.text for word in words) == TEXT + story.text
    assert [word.text for word in words[-len(generated) :]] == [word.text for word in generated]
    for found, expected in zip(words[-len(generated) :], generated, strict=True):
        assert math.isclose(found.bits, expected.bits, abs_tol=1e-3)


async def test_the_distribution_is_whole_and_its_entropy_no_less_than_what_a_reading_gives(
    manager: GenerationManager,
) -> None:
    words = await read(manager, TEXT, (), ME)
    for number in (1, 6, 12):
        place = Place.of([word.tokens for word in words], number)
        found = await distribution(manager, place, ME)
        logprobs = [logprob for _, _, logprob in found["tokens"]] + found["tail"]
        assert found["complete"]
        assert len(found["tokens"]) == MAX_LOGPROBS
        assert logprobs == sorted(logprobs, reverse=True)
        assert math.isclose(sum(map(math.exp, logprobs)), 1, abs_tol=1e-4)
        whole = -sum(math.exp(each) * each for each in logprobs) / math.log(2)
        assert 0 < words[number].entropy <= whole + 1e-3
        assert math.isclose(words[number].entropy, whole, rel_tol=0.25)
        if len(place.word) == 1:
            own = {token: logprob for token, _, logprob in found["tokens"]}.get(place.word[0])
            assert own is None or math.isclose(own, -words[number].bits * math.log(2), abs_tol=1e-3)


class OverHttp(LocalBackend):
    """A service elsewhere: it gives the log-probabilities of 20 tokens at most, and no folder."""

    async def submit(self, request: GenerationRequest) -> Stream:
        if (request.logprobs or 0) > MAX_LOGPROBS:
            raise InputError("logprobs", "must be a whole number between 0 and 20")
        return await super().submit(request)


async def test_from_a_service_elsewhere_the_tail_is_one_number(backend: LocalBackend) -> None:
    here, there = (
        GenerationManager(backend),
        GenerationManager(OverHttp(backend.engine, backend.model, capacity=backend.capacity)),
    )
    place = await place_of(here, TEXT, " ran")
    whole, part = await distribution(here, place, ME), await distribution(there, place, ME)
    assert part["tokens"] == whole["tokens"]
    assert not part["complete"]
    assert math.isclose(math.exp(part["tail"][0]), sum(map(math.exp, whole["tail"])), abs_tol=1e-4)


async def test_a_cut_memory_is_that_of_a_story_that_begins_there(manager: GenerationManager) -> None:
    place = await place_of(manager, TEXT, " kite")
    rows = (await memory(manager, place, ME))["rows"]
    assert [row["reach"] for row in rows] == [1, 4, 16, len(place.tokens)]
    words = await read(manager, TEXT, (), ME)
    assert math.isclose(rows[-1]["bits"], words[len(place.before)].bits, abs_tol=1e-6)
    for row in rows[:-1]:
        alone = await read(manager, "", (*place.tokens[-row["reach"] :], *place.word), ME)
        own = alone[-1]
        assert own.tokens == place.word
        assert math.isclose(row["bits"], own.bits, abs_tol=1e-6)
    assert rows[0]["bits"] > rows[-1]["bits"], "the kite is known from the first sentence"
    assert rows[-1]["likeliest"][0][1] >= rows[-1]["likeliest"][1][1]
    first = Place.of([word.tokens for word in words], 0)
    assert [row["reach"] for row in (await memory(manager, first, ME))["rows"]] == [0]


async def test_an_effect_is_what_the_odds_lose_without_the_word(manager: GenerationManager) -> None:
    place = await place_of(manager, TEXT, " Tom")
    (other,) = [word.tokens for word in await read(manager, " Tim", (), ME)]
    found = await evidence(manager, place, other, ME)
    assert len(found["effects"]) == len(place.before)

    async def odds(before: list[tuple[int, ...]]) -> float:
        costs = []
        for word in (other, place.word):
            tokens = [token for each in (*before, word) for token in each]
            costs.append((await read(manager, "", tokens, ME))[-1].bits)
        return costs[0] - costs[1]

    whole = await odds(list(place.before))
    assert math.isclose(found["odds"], whole, abs_tol=1e-6)
    for left_out in (0, 6, len(place.before) - 1):
        without = await odds([*place.before[:left_out], *place.before[left_out + 1 :]])
        assert math.isclose(found["effects"][left_out], whole - without, abs_tol=1e-6)
    names = {text: found["effects"][at] for at, text in ((0, "Tom"), (6, "Tim"))}
    assert names["Tom"] > 0 > names["Tim"], "each name spoke for itself"


async def test_only_the_last_words_are_left_out(manager: GenerationManager) -> None:
    words = await read(manager, " ".join([TEXT] * 4), (), ME)
    place = Place.of([word.tokens for word in words], len(words) - 1)
    effects = (await evidence(manager, place, (), ME))["effects"]
    first = len(place.before) - EVIDENCE_WORDS
    assert effects[:first] == [None] * first
    assert None not in effects[first:]


async def test_the_layers_read_what_the_weights_say(manager: GenerationManager) -> None:
    words = [word.tokens for word in await read(manager, TEXT, (), ME)]
    number = len(words) - 2
    found = await answer(AppState(manager), "layers", {"words": words, "word": number}, "me")
    place, tokenizer = Place.of(words, number), StoryTokenizer.load(PRETRAINED)
    trace = trace_story(load_network(PRETRAINED), tokenizer, tokenizer.decode(place.tokens))
    assert trace.tokens[1:] == place.tokens
    kinds = [(layer["layer"], layer["kind"]) for layer in found["layers"]]
    assert kinds == [(at + 1, "attention" if each == "A" else "recurrence") for at, each in enumerate("RRARRA")]
    for layer in found["layers"]:
        if layer["kind"] == "attention":
            expected_HT = trace.attentions[layer["layer"] - 1].weight_HTT[:, -1]
        else:
            recurrence = trace.recurrences[layer["layer"] - 1]
            expected_HT = recurrence.left_at_the_end() / recurrence.left_at_the_end().sum(1, keepdim=True)
            lives = [head["half_life"] for head in layer["heads"]]
            assert lives == pytest.approx(recurrence.half_life().tolist(), rel=1e-4)
        for head, weights in zip(layer["heads"], expected_HT.tolist(), strict=True):
            at, sums = 1, []
            for word in place.before:
                sums.append(sum(weights[at : at + len(word)]))
                at += len(word)
            assert head["words"] == pytest.approx(sums, abs=2e-5)
            assert head["start"] + sum(head["words"]) == pytest.approx(1, abs=1e-3)


async def test_without_pytorch_or_the_weights_the_layers_say_what_is_missing(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, given = AppState(GenerationManager(backend)), {"prompt": TEXT, "word": 3}
    monkeypatch.setattr(inside_handlers, "find_spec", lambda name: None)
    assert "needs the 'train' packages: pip install" in (await answer(state, "layers", given, "me"))["error"]
    backend.model = dataclasses.replace(backend.model, folder=None)
    assert "not on this machine" in (await answer(state, "layers", given, "me"))["error"]
    assert "card.md" in inside_handlers.card(state, "")


async def test_the_card_is_that_of_the_model_that_writes(manager: GenerationManager) -> None:
    assert inside_handlers.card(AppState(manager), "") == (PRETRAINED / "card.md").read_text("utf-8")


async def test_without_a_story_an_example_is_written(manager: GenerationManager) -> None:
    found = await answer(AppState(manager), "surprise", {}, "me")
    again = await answer(AppState(manager), "surprise", {"prompt": "", "tokens": []}, "me")
    assert found["example"]
    assert found == again
    assert "".join(text for text, *_ in found["words"]).startswith(str(inside_handlers.EXAMPLE.prompt))


@pytest.mark.parametrize(
    ("question", "given", "message"),
    [
        ("weather", {}, "question must be one of surprise, distribution"),
        ({}, {}, "question must be one of"),
        ("memory", {"words": [[5]], "word": 1}, "word must be the number of a word, 0 to 0, got 1"),
        ("memory", {"words": [[5]], "word": True}, "word must be the number of a word"),
        ("memory", {"words": "no", "word": 0}, "words must be lists of token ids"),
        ("memory", {"words": [[]], "word": 0}, "words must be lists of token ids"),
        ("memory", {"words": [["x"]], "word": 0}, "prompt must be text or token ids, got 'x' among the ids"),
        ("memory", {"words": [[5] * 1025], "word": 0}, "story must have 1 to 1,024 tokens, got 1,025"),
        ("memory", {"words": [[500_000]], "word": 0}, "prompt must hold token ids between 0 and"),
        ("surprise", {"prompt": 7}, "prompt must be text or token ids"),
        ("surprise", {"prompt": "a", "tokens": 7}, "'int' object is not iterable"),
        ("surprise", {"prompt": "One day " * LONGEST}, "story must have 1 to 1,024 tokens"),
        ("evidence", {"words": [[5]], "word": 0, "other": ["x"]}, "prompt must be text or token ids"),
        ("evidence", {"words": [[5]], "word": 0, "other": [5] * 17}, "other must have at most 16 tokens, got 17"),
    ],
)
async def test_what_cannot_be_answered_is_an_error_in_one_line(question: Any, given: Any, message: str) -> None:
    backend = local_backend()
    async with backend.running():
        found = await answer(AppState(GenerationManager(backend)), question, given, "me")
    assert found.keys() == {"error"}
    assert message in found["error"]
    assert "\n" not in found["error"]


async def test_a_question_counts_as_one_story_for_the_rate_limits(backend: LocalBackend) -> None:
    place = await place_of(GenerationManager(backend), TEXT, " ran")
    words = [*place.before, place.word]
    for question in ("surprise", "distribution", "memory", "evidence", "layers"):
        limiter = Limiter(quotas_of("1/minute", "client", "stories"))
        state = AppState(GenerationManager(backend, limiter=limiter))
        given = {"prompt": TEXT} if question == "surprise" else {"words": words, "word": len(words) - 1}
        assert "error" not in await answer(state, question, given, "me")
        assert "limit" in (await answer(state, question, given, "me"))["error"]


async def test_a_backend_without_log_probabilities_says_so(backend: LocalBackend) -> None:
    class Silent(LocalBackend):
        async def submit(self, request: GenerationRequest) -> Stream:
            return await super().submit(dataclasses.replace(request, logprobs=None, prompt_logprobs=None))

    silent = Silent(backend.engine, backend.model, capacity=backend.capacity)
    with pytest.raises(StoryError, match="gives no log-probabilities"):
        await read(GenerationManager(silent), TEXT, (), ME)
