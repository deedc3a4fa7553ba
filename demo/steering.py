"""Steer a story: what else could stand at a word, and how the story could go on from there.

Everything here is a request whose prompt is the story's first tokens, so that any replica or Modal answers it, and the
same seed gives the same bits. A word is one of the text: letters and digits with the space before them, or
the marks between two such runs; a model's token is often only a part of one.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from demo.routing import RoutingBackend
from model.architecture.folder import END_ID
from model.generation import Completion, GenerationRequest, SamplingParams, TokenLogprob, choice_seed
from model.serving.session import GenerationManager

ALTERNATIVES = 8
WORD_TOKENS = 6
"""Tokens of a word at most; a longer one is shown as far as that."""
FUTURES, FUTURE_TOKENS = 16, 40
SILENCE = 5.0
UNKNOWN, PARTIAL = "\N{REPLACEMENT CHARACTER}", r"[^\x00-\x7f]*"
APOSTROPHES = "'\u2019"


class Caller(NamedTuple):
    """Who looks at a story: as the rate limits know it, and as an A/B test does."""

    client: str
    user: str = ""


class Word(NamedTuple):
    """A word of a story as the model wrote it."""

    text: str
    tokens: tuple[int, ...]
    bits: float
    """How surprising it was: -log2 of its probability."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A word that could stand at a place."""

    text: str
    """With the space before it; empty: the story ends here."""
    tokens: tuple[int, ...]
    probability: float
    """Of the whole word, before sampling filters."""

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, "tokens": list(self.tokens), "probability": self.probability}


@dataclass(slots=True)
class Branch:
    """Words that several futures have in common, and what follows in each."""

    words: list[Word]
    """Of several futures that have a word in different tokens, those of the first."""
    count: int
    """Futures that go this way."""
    branches: list["Branch"]

    def as_dict(self) -> dict[str, Any]:
        branches = [branch.as_dict() for branch in self.branches]
        return {"words": [list(word) for word in self.words], "count": self.count, "branches": branches}


def _inner(character: str) -> bool:
    return character.isalnum() or character in APOSTROPHES


def goes_on(word: str, text: str) -> bool:
    """Whether a token with this text belongs to the word before it. Half a character does."""
    if not text or word.isspace() or UNKNOWN in text:
        return True
    if not word or text[0].isspace():
        return False
    return _inner(word[-1]) == _inner(text[0])


def words_of(tokens: Iterable[TokenLogprob], text: str) -> list[Word]:
    """Split a generated `text` into words, by its tokens in their order; joined, the words are the text.

    None come where the tokens are not those of the text, as from a service that sent no log-probabilities.
    """
    groups: list[list[TokenLogprob]] = []
    for token in tokens:
        if groups and goes_on("".join(each.text for each in groups[-1]), token.text):
            groups[-1].append(token)
        else:
            groups.append([token])
    return matched(groups, text)


def matched(groups: Sequence[Sequence[TokenLogprob]], text: str) -> list[Word]:
    """The words of `text` whose tokens are given word by word; none where the tokens are not those of the text."""
    # A character of several tokens has no text of its own in any of them; in any case it is not ASCII.
    known = [[PARTIAL if UNKNOWN in each.text else re.escape(each.text) for each in group] for group in groups]
    found = re.fullmatch("".join(f"({''.join(parts)})" for parts in known), text)
    if found is None:
        return []
    return [
        Word(word, tuple(each.token for each in group), -sum(each.logprob for each in group) / math.log(2))
        for word, group in zip(found.groups(), groups, strict=True)
    ]


def as_lists(words: Iterable[Word]) -> list[list[Any]]:
    """Words as the page has them."""
    return [[word.text, list(word.tokens), round(word.bits, 3)] for word in words]


async def alternatives(
    manager: GenerationManager, request: GenerationRequest, caller: Caller, count: int = ALTERNATIVES
) -> list[Alternative]:
    """Words that could come next after the prompt of `request`, the likeliest first.

    The model's likeliest next tokens, each followed by what is likeliest until its word ends. Raises what a session
    raises: `BusyError`, `LimitError`, `InputError`.
    """
    prefix = _tokens_of(request)
    greedy = SamplingParams(temperature=0, keep_names=False)
    ask = replace(request, sampling=greedy, stop=(), cacheable=False)
    # The end of the story is among the alternatives, though it is not to come.
    once = replace(ask, sampling=replace(greedy, ignore_eos=True), max_tokens=1, logprobs=count)
    (first,) = await generate(manager, [once], caller, stories=1)
    starts = first.logprobs[0].alternatives
    follow = [
        replace(ask, prompt=(*prefix, token), max_tokens=WORD_TOKENS, logprobs=0)
        for token, _, _ in starts
        if token != END_ID
    ]
    rests = iter(await generate(manager, follow, caller))
    found: dict[str, Alternative] = {}
    for token, text, logprob in starts:
        tokens = [token]
        if token != END_ID:
            for entry in next(rests).logprobs:
                if not goes_on(text, entry.text) or entry.token == END_ID:
                    break
                tokens.append(entry.token)
                text, logprob = text + entry.text, logprob + entry.logprob
        known = found.get(text)
        if known is None or known.probability < math.exp(logprob):
            found[text] = Alternative(text, tuple(tokens) if token != END_ID else (), math.exp(logprob))
    return sorted(found.values(), key=lambda each: -each.probability)


async def futures(
    manager: GenerationManager, request: GenerationRequest, caller: Caller, count: int = FUTURES
) -> list[Branch]:
    """`count` beginnings of continuations of `request`, merged where they begin alike; the likeliest way first.

    Their seeds are those of the choices of a request with `n`.
    """
    seed = request.sampling.seed
    requests = [
        replace(
            request,
            max_tokens=FUTURE_TOKENS,
            logprobs=0,
            sampling=replace(request.sampling, seed=choice_seed(seed, number), min_tokens=0),
        )
        for number in range(count)
    ]
    done = await generate(manager, requests, caller, stories=1)
    return merge([words_of(each.logprobs, each.text) for each in done])


async def roll(manager: GenerationManager, request: GenerationRequest, caller: Caller) -> list[Any] | None:
    """Draw the next word as the sampling of `request` says; None: the story ends here.

    It counts for the token limits only, as whoever rolls has looked at the place before.
    """
    ask = replace(request, max_tokens=WORD_TOKENS, logprobs=0, cacheable=False)
    (done,) = await generate(manager, [ask], caller)
    return next(iter(as_lists(words_of(done.logprobs, done.text))), None)


def merge(stories: Sequence[Sequence[Word]]) -> list[Branch]:
    """Merge lists of words by their common beginnings; of the branches at a place, the one with most stories first."""
    groups: dict[str, list[Sequence[Word]]] = {}
    for story in stories:
        if story:
            groups.setdefault(story[0].text, []).append(story)
    branches = []
    for group in groups.values():
        branch = Branch([group[0][0]], len(group), merge([story[1:] for story in group]))
        if len(branch.branches) == 1 and branch.branches[0].count == branch.count:  # nothing parts here
            (only,) = branch.branches
            branch = Branch([*branch.words, *only.words], only.count, only.branches)
        branches.append(branch)
    return sorted(branches, key=lambda branch: -branch.count)


async def prompt_tokens(manager: GenerationManager, text: str, caller: Caller, stories: int = 0) -> tuple[int, ...]:
    """The tokens of a text as the model that serves reads it; it counts as so many stories for the rate limits."""
    (done,) = await generate(manager, [GenerationRequest(prompt=text, max_tokens=0, echo=True)], caller, stories)
    return () if done.prompt is None else done.prompt.tokens


def _tokens_of(request: GenerationRequest) -> tuple[int, ...]:
    assert isinstance(request.prompt, tuple), "a story is forked at its tokens"
    return request.prompt


async def generate(
    manager: GenerationManager, requests: Sequence[GenerationRequest], caller: Caller, stories: int = 0
) -> list[Completion]:
    """The completions of all requests, which count as so many stories for the rate limits.

    At most half of the capacity run at once: others want to write too. The user's variant of an A/B test answers, and
    the test does not count it: nobody reads these as stories.
    """
    done: list[Completion] = []
    if isinstance(backend := manager.backend, RoutingBackend):
        requests = [replace(each, variant=backend.split.assign(caller.user)) for each in requests]
    size = max(1, manager.backend.capacity // 2)
    for first in range(0, len(requests), size):
        some = requests[first : first + size]
        async with manager.session(some, caller.client, stories if first == 0 else 0) as session:
            async for _ in session.events(SILENCE):
                pass
            done += session.completions
    return done
