"""Stories that a model generates from fixed prompts and seeds, and the figures that are measured on them.

Words are runs of letters, digits and apostrophes, in lower case: "Tim's" is one, a full stop is none. A name is
recognised by its form: a word in mid-sentence with a capital letter. That misses a name which only ever opens
sentences, and takes Monday for one; both affect every model alike. The figures are crude on purpose, so that each can
be checked by reading the stories.

Memorisation is the longest run of words that a generated story shares with a training story. The generated stories are
few, so their runs of `ANCHOR` words are indexed, and the training stories are streamed: memory does not grow with the
corpus. A run that is found is followed to its end.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.statistics import CONFIDENCE, Estimate, mean_over_prompts
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.errors import StoryError
from model.generation import GenerationRequest, SamplingParams
from model.wishes import Wishes
from training.data.corpus import find_files, load_own_stories, read_stories, story_id
from training.data.rename import NOT_NAMES
from training.data.shards import TokenShard

PROMPTS = Path(__file__).with_name("prompts.jsonl")
RARE_PROMPTS = Path(__file__).with_name("rare_prompts.jsonl")
"""With unusual names, one or two each, that occur in no training story, renamed ones included
(`training.data.rename.HELD_OUT`)."""
WISH_PROMPTS = Path(__file__).with_name("wish_prompts.jsonl")
"""With one wish each."""
MAX_TOKENS = 500
OPENING_WORDS = 40
"""Of the continuation: about the first three sentences."""
CAPITALISED = re.compile(r"(?<=[\w,;] )[A-Z][a-z]+\b")
"""Behind a word or a comma and one space. "I", "I'm" and "OK" are no names."""
TITLES = {"Mr", "Mrs", "Ms", "Dr"}
ADDRESSED = r'\b{name} (?:said|asked|replied|answered)(?: to [^,."]{{1,20}})?[,:]? "[^"]*\b{name}\b'
"""Somebody who speaks to himself by name."""
PREFIX = 2
"""Names that share this many first letters are near."""
DISTANCE = 2
"""So are names of more than `SHORT` letters with this edit distance or less."""
SHORT = 3


@dataclass(frozen=True, slots=True)
class Prompt:
    """A story's beginning, the children it names, and what the story is wished to have."""

    text: str
    names: tuple[str, ...] = ()
    wishes: Wishes = field(default_factory=Wishes)


@dataclass(frozen=True, slots=True)
class WrittenStory:
    """One generated story."""

    prompt: Prompt
    number: int
    """The prompt's place in its file, from 0."""
    seed: int
    """Which pass over all prompts this is; not the sampling seed."""
    text: str
    """The continuation."""
    tokens: int
    ended: bool
    """The model ended it; False: it reached `MAX_TOKENS`."""


class UnfinishedStoryError(StoryError):
    """The engine did not finish a story."""

    exit_code = 1


@cache
def load_prompts(path: Path = PROMPTS) -> tuple[Prompt, ...]:
    """Prompts out of a JSON Lines file of this package: `{"prompt": "…", "names": ["…"], "wishes": {…}}`."""

    def prompt(record: dict[str, Any]) -> Prompt:
        wishes = record.get("wishes", {})
        return Prompt(
            record["prompt"],
            tuple(record.get("names", ())),
            Wishes(**wishes | {"words": tuple(wishes.get("words", ()))}),
        )

    return tuple(map(prompt, map(json.loads, path.read_text("utf-8").splitlines())))


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts in their order."""
    return hashlib.sha256(json.dumps([prompt.text for prompt in prompts]).encode()).hexdigest()


def generate_stories(
    engine: Engine, prompts: Sequence[Prompt], seeds: Sequence[int], done: Callable[[int], None] = lambda stories: None
) -> list[WrittenStory]:
    """Each prompt once for each seed, with the default sampling; ordered by seed, then by prompt.

    The stories of one seed are submitted together, so the engine must have slots and queue for all prompts.
    Its sampling seed is `seed * prompts + number`, so no two stories of an evaluation share one. `done` is called after
    each story.

    Raises:
        UnfinishedStoryError: the model failed.
    """
    stories = []
    for seed in seeds:
        samplings = [SamplingParams(seed=seed * len(prompts) + number) for number in range(len(prompts))]
        streams = [
            engine.submit(
                GenerationRequest(prompt=prompt.text, max_tokens=MAX_TOKENS, sampling=sampling, wishes=prompt.wishes)
            )
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            text = "".join(chunk.text for chunk in stream)
            end = stream.completion
            if end.finish_reason not in ("stop", "length"):
                why = end.error or end.finish_reason
                raise UnfinishedStoryError(f"the story of prompt {number + 1} was not finished: {why}")
            ended = end.finish_reason == "stop"
            stories.append(WrittenStory(prompt, number, seed, text, end.usage.completion_tokens, ended))
            done(1)
    return stories


def distinct(sequence: Sequence[str], size: int) -> float | None:
    """Different runs of `size` words over all of them, above 0 and at most 1; None where there is no such run."""
    runs = list(zip(*(sequence[start:] for start in range(size)), strict=False))
    return len(set(runs)) / len(runs) if runs else None


def repeated(sequence: Sequence[str], size: int) -> float | None:
    """Share of the runs of `size` words that occurred before; None where there is no such run."""
    share = distinct(sequence, size)
    return None if share is None else 1 - share


def split_opening(text: str, count: int = OPENING_WORDS) -> tuple[str, str]:
    """A continuation's first `count` words, with everything between them, and the rest."""
    for number, word in enumerate(re.finditer(r"\S+", text), 1):
        if number == count:
            return text[: word.end()], text[word.end() :]
    return text, ""


def names_in(text: str) -> set[str]:
    """Capitalised words in mid-sentence."""
    return set(CAPITALISED.findall(text)) - TITLES


def holds(text: str, name: str) -> bool:
    """Whether `text` has `name` as a word of its own; "Tim's" holds Tim, and "Timmy" does not."""
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def all_kept(continuation: str, names: Iterable[str]) -> bool:
    """Whether each of the prompt's names comes again in the continuation."""
    return all(holds(continuation, name) for name in names)


def share_kept(prompt: str, continuation: str, names: Iterable[str]) -> float | None:
    """Of the names given, and those found in prompt and opening, the share that comes again after the opening.

    None where there is no name, or where the story is over with its opening.
    """
    opening, rest = split_opening(continuation)
    wanted = {*names, *names_in(prompt + opening)}
    if not wanted or not rest.strip():
        return None
    return sum(holds(rest, name) for name in wanted) / len(wanted)


def speaks_to_himself(story: str, names: Iterable[str]) -> bool:
    """Whether somebody of `names` addresses himself by name."""
    return any(re.search(ADDRESSED.format(name=re.escape(name)), story) for name in names)


class Meaning(NamedTuple):
    """How a figure of a story is shown, and whether it is 0 or 1 for each story."""

    label: str
    form: str = ".1%"
    binary: bool = False


FIGURES = {
    "ended": Meaning("end by themselves", binary=True),
    "mean_tokens": Meaning("tokens", ".1f"),
    "mean_words": Meaning("words", ".1f"),
    "distinct_1": Meaning("different words"),
    "distinct_2": Meaning("different word pairs"),
    "distinct_3": Meaning("different word triples"),
    "repeated_4": Meaning("4-word runs repeated"),
    "looping": Meaning("loop", binary=True),
    "names_kept": Meaning("keep all names of the prompt", binary=True),
    "opening_names_kept": Meaning("names of the opening kept"),
    "names_confused": Meaning("somebody addresses himself", binary=True),
    "names_straight": Meaning("names kept and not confused", binary=True),
    "copied_words": Meaning("longest copied run, words", ".1f"),
    "copied_share": Meaning("longest copied run of the story"),
}
WISHED = ("words", "length", "dialogue", "sad", "happy")
"""Figures of `measure_wishes`."""
BINARY = {name for name, meaning in FIGURES.items() if meaning.binary} | {"kept", "mutated", *WISHED}
"""Figures that are 0 or 1 for each story; the last ones are those of `measure_rare_names` and `measure_wishes`."""
Figures = dict[str, float | None]
"""Figures of one story; None: not defined for it."""


def story_figures(story: WrittenStory, copy: Copy | None = None) -> Figures:
    """Measure one story; `copy` is what it shares with the training stories, where they were given.

    A story loops if half of its 4-word runs or more occurred in it before.
    """
    sequence = words(story.text)
    repeats = repeated(sequence, 4)
    kept = all_kept(story.text, story.prompt.names)
    confused = speaks_to_himself(f"{story.prompt.text} {story.text}", story.prompt.names)
    return {
        "ended": float(story.ended),
        "mean_tokens": story.tokens,
        "mean_words": len(sequence),
        **{f"distinct_{size}": distinct(sequence, size) for size in (1, 2, 3)},
        "repeated_4": repeats,
        "looping": float(repeats is not None and repeats >= 0.5),
        "names_kept": float(kept),
        "opening_names_kept": share_kept(story.prompt.text, story.text, story.prompt.names),
        "names_confused": float(confused),
        "names_straight": float(kept and not confused),
        "copied_words": None if copy is None else copy.words,
        "copied_share": None if copy is None else copy.share,
    }


def mean_of(rows: Iterable[Mapping[str, Any]], figure: str, *, level: float = CONFIDENCE) -> Estimate | None:
    """Mean of a figure over rows that have a prompt's `number` and a `seed`; None where it is defined for none."""
    from pandas import DataFrame

    cells = [(row["number"], row["seed"], row.get(figure)) for row in rows]
    table = DataFrame(cells, columns=["number", "seed", "value"]).pivot(index="number", columns="seed", values="value")
    return mean_over_prompts(table.to_numpy(float), binary=figure in BINARY, level=level)


@dataclass(frozen=True, slots=True)
class StorySet:
    """Generated stories, and what was measured on each."""

    stories: tuple[WrittenStory, ...]
    figures: tuple[Figures, ...]
    """In the same order."""

    def estimates(self) -> dict[str, Estimate]:
        """Mean and interval of each figure that is defined for any story."""
        rows = [
            {"number": story.number, "seed": story.seed} | figures
            for story, figures in zip(self.stories, self.figures, strict=True)
        ]
        means = {name: mean_of(rows, name) for name in self.figures[0]}
        return {name: mean for name, mean in means.items() if mean is not None}

    def rows(self) -> list[dict[str, Any]]:
        """A row a story, for a table in MLflow."""
        return [
            {"number": story.number, "seed": story.seed, "prompt": story.prompt.text, "text": story.text}
            | {name.removeprefix("mean_"): value for name, value in figures.items()}
            for story, figures in zip(self.stories, self.figures, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values: means at the top, intervals beside."""
        estimates = self.estimates()
        return {
            "stories": len(self.stories),
            **{name: estimate.value for name, estimate in estimates.items()},
            "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        }


@dataclass(frozen=True, slots=True)
class Written(StorySet):
    """The stories of one model from the fixed prompts."""

    copies: tuple[Copy, ...] | None = None
    """Of each story; None: no training stories were given."""

    @classmethod
    def measure(cls, stories: Sequence[WrittenStory], copies: Sequence[Copy] | None = None) -> Written:
        matched = copies if copies is not None else [None] * len(stories)
        figures = tuple(map(story_figures, stories, matched))
        return cls(tuple(stories), figures, None if copies is None else tuple(copies))

    @property
    def seeds(self) -> list[int]:
        return sorted({story.seed for story in self.stories})

    @property
    def longest_copy(self) -> Copy | None:
        return max(self.copies, key=lambda copy: copy.words) if self.copies else None

    def rows(self) -> list[dict[str, Any]]:
        """See `StorySet`; also the prompt's names, and what was copied from which training story."""
        copies = self.copies or [Copy(0, 0.0, "", "")] * len(self.stories)
        return [
            row | {"names": ", ".join(story.prompt.names), "copied_text": copy.text, "copied_from": copy.story}
            for row, story, copy in zip(StorySet.rows(self), self.stories, copies, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """See `StorySet`."""
        longest = self.longest_copy
        return StorySet.as_dict(self) | {
            "seeds": self.seeds,
            "copied_words_max": None if longest is None else longest.words,
        }


def measure_rare_names(stories: Sequence[WrittenStory]) -> StorySet:
    """Measure stories of `RARE_PROMPTS`: `kept` (all names of the prompt come again), `mutated` and `ended`.

    A story is mutated if it has a name that is near to one of the prompt's and is none of them, as when Ember becomes
    Emild. That misses distant names and those that only begin sentences.
    """
    figures: list[Figures] = [
        {
            "kept": float(all_kept(story.text, story.prompt.names)),
            "mutated": float(bool(mutations(story.prompt, story.text))),
            "ended": float(story.ended),
        }
        for story in stories
    ]
    return StorySet(tuple(stories), tuple(figures))


def measure_wishes(stories: Sequence[WrittenStory]) -> StorySet:
    """Measure how often wishes are met, each kind by itself: see `WISHED`."""
    return StorySet(tuple(stories), tuple(map(_wishes_met, stories)))


def _wishes_met(story: WrittenStory) -> Figures:
    prompt, wishes = story.prompt, story.prompt.wishes
    whole = wishes.met(prompt.text + story.text)
    met = {
        **{name: whole.get(name) for name in ("words", "length", "dialogue")},
        "sad": whole.get("ending") if wishes.ending == "sad" else None,
        "happy": whole.get("ending") if wishes.ending == "happy" else None,
    }
    return {name: None if value is None else float(value) for name, value in met.items()}


def mutations(prompt: Prompt, continuation: str) -> set[str]:
    """Names of the continuation that are near to one of the prompt's and do not occur in the prompt."""
    new = names_in(continuation) - NOT_NAMES - set(prompt.names) - names_in(prompt.text)
    return {word for word in new if any(_near(word, name) for name in prompt.names)}


def _near(word: str, name: str) -> bool:
    if word[:PREFIX] == name[:PREFIX]:
        return True
    return min(len(word), len(name)) > SHORT and edit_distance(word.lower(), name.lower()) <= DISTANCE


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of letters that turn `one` into `other` (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for place, wanted in enumerate(other, 1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (letter != wanted))
            diagonal, row[place] = row[place], best
    return row[-1]


ANCHOR = 5
"""Shorter runs are not looked for: stories of one kind share them all."""
WORD = re.compile(r"[\w']+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


@dataclass(frozen=True, slots=True)
class TrainingTexts:
    """The stories a model was trained on: read one at a time, as often as needed, always in the same order."""

    sources: tuple[Path, ...]
    """Files or folders of stories, or folders of shards; empty: the training part of our own corpus."""

    @classmethod
    def of(cls, sources: Sequence[Path]) -> TrainingTexts:
        """Check that each source is there. Raises `DataError` that names it."""
        for source in sources:
            if _is_shards(source):
                TokenShard(source, "train")
            else:
                find_files([source])
        return cls(tuple(sources))

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources) or "our own corpus"

    def __iter__(self) -> Iterator[str]:
        if not self.sources:
            yield from (story.text for story in load_own_stories("train"))
        for source in self.sources:
            if _is_shards(source):
                yield from _of_shards(source)
            else:
                for path in find_files([source]):
                    yield from (story.text for story in read_stories(path))


@dataclass(frozen=True, slots=True)
class Copy:
    """The longest run that a generated story and some training story share."""

    words: int
    """0: none of at least `ANCHOR` words."""
    share: float
    """Of the story's words."""
    text: str
    """Its words, in lower case."""
    story: str
    """Id of the training story; of several, any."""


def longest_copies(written: Sequence[str], training: Iterable[str]) -> list[Copy]:
    """For each generated story, the longest run of at least `ANCHOR` words that a training story holds too."""
    stories = [words(text) for text in written]
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for index, story in enumerate(stories):
        for start, run in enumerate(_runs(story)):
            places.setdefault(run, []).append((index, start))
    copies = [Copy(0, 0.0, "", "")] * len(stories)
    for text in training:
        other = words(text)
        for at, run in enumerate(_runs(other)):
            for index, start in places.get(run, ()):
                story, length = stories[index], ANCHOR
                if at and start and other[at - 1] == story[start - 1]:
                    continue  # the inside of a run that is followed from its start
                for ours, theirs in zip(story[start + ANCHOR :], other[at + ANCHOR :], strict=False):
                    if ours != theirs:
                        break
                    length += 1
                if length > copies[index].words:
                    copied = " ".join(story[start : start + length])
                    copies[index] = Copy(length, length / len(story), copied, story_id(text))
    return copies


def _runs(sequence: list[str]) -> Iterable[tuple[str, ...]]:
    return zip(*(sequence[offset:] for offset in range(ANCHOR)), strict=False)


def _is_shards(source: Path) -> bool:
    return (source / "train.bin").is_file()


def _of_shards(folder: Path) -> Iterator[str]:
    shard, tokenizer = TokenShard(folder, "train"), StoryTokenizer.load(folder)
    for index in range(len(shard)):
        yield tokenizer.decode(shard.story(index)[1:].tolist())
