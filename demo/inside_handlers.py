"""What the page Inside shows, without the page: how surprising each word of a story was, and what it depends on.

All but `layers` is asked of whatever serves, as requests with token-array prompts that give log-probabilities: it works
with any replica, and without PyTorch. `layers` needs the weights on this machine and PyTorch, which runs in a process
of its own (`experiments.interpret.words`).

A story is a list of words, each the tokens that the model wrote or reads; a word is named by its number, from 0.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from typing import Any, Literal, NamedTuple, Self, get_args

from anyio import BrokenWorkerProcess, CapacityLimiter, to_process

from demo.handlers import AppState
from demo.steering import Caller, alternatives, generate, prompt_tokens, words_of
from experiments.interpret.words import layers_at
from model.architecture.folder import END_ID
from model.errors import InputError, MissingExtraError, StoryError
from model.generation import MAX_LOGPROBS, MAX_TOKEN_ID, GenerationRequest, SamplingParams, TokenLogprob
from model.serving.backend import model_for
from model.serving.session import GenerationManager

LONGEST = 1_024
"""Tokens of a story at most: what the layers read grows with their square."""
REACHES = (1, 4, 16, 64)
"""Tokens before a word that the model may see, beside all of them."""
EVIDENCE_WORDS = 48
"""Words before a word that are left out, one at a time: each costs two requests."""
MOST_OTHER = 16
"""Tokens of the other word."""
LIKELIEST = 8
TIMEOUT = 90.0
"""Seconds that the layers may take, PyTorch's import included."""
ONE = CapacityLimiter(1)
EXAMPLE = GenerationRequest(
    prompt="Tom had a red kite. Tim had a blue kite.",
    max_tokens=160,
    sampling=SamplingParams(seed=7, temperature=0.6),
    logprobs=0,
)

Question = Literal["surprise", "distribution", "memory", "evidence", "layers"]
Answer = dict[str, Any]


class ReadWord(NamedTuple):
    """A word of a story as the model reads it."""

    text: str
    tokens: tuple[int, ...]
    bits: float
    """How surprising it was: -log2 of its probability."""
    entropy: float
    """Bits of surprise that were to be expected at its first token; of the tokens beyond the 20 likeliest, which count
    as one, it leaves out how they differ, so it is a lower bound."""


@dataclass(frozen=True, slots=True)
class Place:
    """A word of a story, and the words before it."""

    before: tuple[tuple[int, ...], ...]
    word: tuple[int, ...]

    @classmethod
    def of(cls, words: object, number: object) -> Self:
        """Check what a client sends. Raises `InputError` that names the field."""
        if not isinstance(words, list | tuple) or not all(isinstance(word, list | tuple) and word for word in words):
            raise InputError("words", "must be lists of token ids, one a word")
        if type(number) is not int or not 0 <= number < len(words):
            raise InputError("word", f"must be the number of a word, 0 to {len(words) - 1}, got {number!r}")
        check_length(sum(map(len, words)))
        return cls(tuple(map(tuple, words[:number])), tuple(words[number]))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens before the word."""
        return tuple(chain.from_iterable(self.before))


def check_length(tokens: int) -> None:
    """Raise `InputError` for a story of no token, or of too many."""
    if not 1 <= tokens <= LONGEST:
        raise InputError("story", f"must have 1 to {LONGEST:,} tokens, got {tokens:,}")


async def answer(state: AppState, question: object, given: Mapping[str, Any], client: str, user: str = "") -> Answer:
    """Answer one question about a story, or say in `error` why not.

    `given` holds the story as text (`prompt`) with `tokens` that follow it, or as `words`; then the number of a `word`,
    and for the evidence another one (`other`), as tokens or text.
    """
    manager, caller = state.manager, Caller(client, user)
    try:
        if question not in get_args(Question):
            raise InputError("question", f"must be one of {', '.join(get_args(Question))}, got {question!r}")
        if question == "surprise":
            return await surprise(manager, given.get("prompt", ""), given.get("tokens", ()), caller)
        words = given.get("words")
        if words is None:
            words = [word.tokens for word in await read(manager, given.get("prompt", ""), (), caller)]
        place = Place.of(words, given.get("word"))
        if question == "layers":
            return await layers(state, place, caller)
        if question == "evidence":
            other = given.get("other") or ()
            other = await prompt_tokens(manager, other, caller) if isinstance(other, str) else tuple(other)
            return await evidence(manager, place, other, caller)
        return await (distribution if question == "distribution" else memory)(manager, place, caller)
    except (StoryError, TypeError) as error:
        return {"error": str(error)}


async def surprise(manager: GenerationManager, prompt: str, tokens: Iterable[int], caller: Caller) -> Answer:
    """The `words` of a story, each with its text, tokens, bits and entropy; without a story, of an `example`."""
    tokens = tuple(tokens)
    example = not (prompt or tokens)
    if example:
        (done,) = await generate(manager, [EXAMPLE], caller)
        prompt, tokens = str(EXAMPLE.prompt), tuple(each.token for each in done.logprobs)
    words = await read(manager, prompt, tokens, caller)
    return {"example": example, "words": [list(word) for word in words]}


async def read(manager: GenerationManager, prompt: str, tokens: Iterable[int], caller: Caller) -> list[ReadWord]:
    """Score the story of the text `prompt` and the `tokens` after it, word by word."""
    story = (*await prompt_tokens(manager, prompt, caller), *tokens)
    check_length(len(story))
    ((entries, text),) = await _score(manager, [story], MAX_LOGPROBS, caller, stories=1)
    read, at = [], 0
    for word in words_of(entries, text):
        read.append(ReadWord(*word, _entropy(entries[at])))
        at += len(word.tokens)
    return read


async def distribution(manager: GenerationManager, place: Place, caller: Caller) -> Answer:
    """What could come instead of a word: the likeliest `tokens` with log-probabilities, and those of the `tail`.

    The tail is that of the whole vocabulary, without texts; where it is not known (`complete` is false), as from a
    service elsewhere, it is one number for all of it.
    """
    once = SamplingParams(temperature=0, keep_names=False, ignore_eos=True)
    ask = GenerationRequest(
        prompt=(END_ID, *place.tokens), max_tokens=1, logprobs=MAX_TOKEN_ID, sampling=once, cacheable=False
    )
    try:
        (done,) = await generate(manager, [ask], caller, stories=1)
    except InputError:  # over HTTP there are 20 at most
        (done,) = await generate(manager, [replace(ask, logprobs=MAX_LOGPROBS)], caller, stories=1)
    found = done.logprobs[0].alternatives
    tail = [round(logprob, 5) for _, _, logprob in found[MAX_LOGPROBS:]]
    rest = 1 - sum(math.exp(logprob) for _, _, logprob in found)
    complete = bool(tail) or rest < 1e-6
    if not complete:
        tail = [math.log(rest)]
    return {"tokens": [list(each) for each in found[:MAX_LOGPROBS]], "tail": tail, "complete": complete}


async def memory(manager: GenerationManager, place: Place, caller: Caller) -> Answer:
    """What a word costs, and what is likeliest, where the model sees only the last tokens before it.

    A row for each reach; the last one sees all. With less than all, the story seems to begin there.
    """
    tokens = place.tokens
    reaches = [*(reach for reach in REACHES if reach < len(tokens)), len(tokens)]
    texts = [(*tokens[len(tokens) - reach :], *place.word) for reach in reaches]
    rows = []
    for reach, (entries, _) in zip(reaches, await _score(manager, texts, LIKELIEST, caller, stories=1), strict=True):
        likeliest = [[text, math.exp(logprob)] for _, text, logprob in entries[reach].alternatives]
        rows.append({"reach": reach, "bits": _bits(entries[reach:]), "likeliest": likeliest})
    return {"rows": rows}


async def evidence(manager: GenerationManager, place: Place, other: tuple[int, ...], caller: Caller) -> Answer:
    """Which words before a word spoke for it, and which for another: `other`, or the likeliest that it is not.

    Each of the last words is left out in turn, and the odds of the two are measured anew: what they lose, in bits, is
    the word's effect, positive where it spoke for the word that stands there. Leaving out makes texts that nobody
    would write, and two words that say the same hide each other.
    """
    if len(other) > MOST_OTHER:
        raise InputError("other", f"must have at most {MOST_OTHER} tokens, got {len(other)}")
    greedy = SamplingParams(temperature=0, keep_names=False)
    found = await alternatives(manager, GenerationRequest(prompt=(END_ID, *place.tokens), sampling=greedy), caller)
    others = [each for each in found if each.tokens and each.tokens != place.word]
    if not (other or others):
        raise StoryError("nothing else could stand here")
    other = other or others[0].tokens
    first = max(0, len(place.before) - EVIDENCE_WORDS)
    left_out = [(*place.before[:at], *place.before[at + 1 :]) for at in range(first, len(place.before))]
    contexts = [tuple(chain.from_iterable(words)) for words in (place.before, *left_out)]
    texts = [(*context, *word) for context in contexts for word in (place.word, other)]
    costs = [
        _bits(entries[len(entries) - len(word) :])
        for (entries, _), word in zip(
            await _score(manager, texts, 0, caller), (place.word, other) * len(contexts), strict=True
        )
    ]
    odds = [theirs - own for own, theirs in zip(costs[::2], costs[1::2], strict=True)]
    return {
        "odds": odds[0],
        "effects": [None] * first + [odds[0] - without for without in odds[1:]],
        "other": list(other),
        "others": [each.as_dict() for each in others],
    }


async def layers(state: AppState, place: Place, caller: Caller) -> Answer:
    """What each head of each layer reads as the model chooses a word: shares of the words before it.

    Raises `StoryError` where the weights or PyTorch are not on this machine.
    """
    model = model_for(state.manager.backend, caller.user)
    if model.folder is None:
        raise StoryError("the model that writes here runs elsewhere: its weights are not on this machine")
    if find_spec("torch") is None or find_spec("safetensors") is None:
        raise MissingExtraError("what the layers read", "train")
    admission = GenerationRequest(prompt=(END_ID,), max_tokens=0, echo=True)
    await generate(state.manager, [admission], caller, stories=1)
    given = (model.folder, model.version, (END_ID, *place.tokens), tuple(map(len, place.before)))
    for attempt in (1, 2):
        try:
            async with asyncio.timeout(TIMEOUT):
                return {"layers": await to_process.run_sync(layers_at, *given, cancellable=True, limiter=ONE)}
        except BrokenWorkerProcess:  # at first its idle time may just have ended
            if attempt == 2:
                break
        except TimeoutError:
            break
    raise StoryError("the layers could not be read; please try again in a moment")


def card(state: AppState, user: str) -> str:
    """The card of the model that writes, in Markdown, or a line that says why there is none."""
    folder = model_for(state.manager.backend, user).folder
    if folder is None:
        return "The model that writes here runs elsewhere; its card lies in its folder, `card.md`."
    try:
        return (folder / "card.md").read_text("utf-8")
    except OSError:
        return "The model's folder holds no `card.md`."


async def _score(
    manager: GenerationManager, texts: Sequence[Sequence[int]], best: int, caller: Caller, stories: int = 0
) -> list[tuple[list[TokenLogprob], str]]:
    """Each token's log-probability, with its `best` rivals, in whole stories of these tokens; and their texts."""
    # A service elsewhere knows one number for prompt and story.
    requests = [
        GenerationRequest(prompt=(END_ID, *tokens), max_tokens=0, echo=True, logprobs=best, prompt_logprobs=best)
        for tokens in texts
    ]
    scored = []
    for done, tokens in zip(await generate(manager, requests, caller, stories), texts, strict=True):
        entries = [] if done.prompt is None else [each for each in done.prompt.logprobs if each is not None]
        if done.prompt is None or len(entries) != len(tokens):
            raise StoryError("what serves here gives no log-probabilities of a text")
        scored.append((entries, done.prompt.text))
    return scored


def _bits(entries: Iterable[TokenLogprob]) -> float:
    return -sum(each.logprob for each in entries) / math.log(2)


def _entropy(entry: TokenLogprob) -> float:
    """In bits, with all but the likeliest as one."""
    shares = [math.exp(logprob) for _, _, logprob in entry.alternatives]
    shares.append(max(0.0, 1 - sum(shares)))
    return -sum(share * math.log2(share) for share in shares if share > 0)
