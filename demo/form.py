"""The fields of the page's form: names, order and limits, the same for layout, handlers and links.

The limits are those of `model.generation`; the page narrows two of them.

A link reopens the same prompt and settings. Everything is in the query string and nothing is stored, so it works on
every replica. It names the model's version, because another version writes another story from the same seed. Input is
untrusted: a value that cannot be used is left at its default and reported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, get_args
from urllib.parse import quote, urlencode

from model.errors import InputError, one_line
from model.generation import GenerationRequest, SamplingParams, new_seed
from model.wishes import Ending, Length, Wishes

MAX_SEED = 2**53 - 1
"""The largest whole number that a browser's number field holds exactly (IEEE 754 double)."""

LONGEST = 1_024
"""Tokens at most of one press of Write: several times a usual story of the kind that the model knows."""

_USUAL = GenerationRequest(prompt="")
ANY = "any"
"""The choice of somebody who has no wish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What stands in the page's fields. Values are unchecked until `problems` or `request` is called."""

    prompt: str = ""
    max_tokens: int = _USUAL.max_tokens
    temperature: float = _USUAL.sampling.temperature
    top_p: float = _USUAL.sampling.top_p
    top_k: int = _USUAL.sampling.top_k
    min_p: float = _USUAL.sampling.min_p
    repetition_penalty: float = _USUAL.sampling.repetition_penalty
    words: str = ""
    """Words to come in the story, with spaces or commas between."""
    story_length: str = ANY
    dialogue: str = ANY
    ending: str = ANY
    seed: int | None = _USUAL.sampling.seed
    """None: a new one for each story."""

    def drawn(self) -> Self:
        """This form with a seed: its own, or a new one."""
        return replace(self, seed=new_seed()) if self.seed is None else self

    def request(self, prompt: str | None = None) -> GenerationRequest:
        """The request that this form makes, going on from `prompt` when one is given.

        Raises `InputError` that names the first bad field.
        """
        for name in FIELDS:
            if (problem := check_field(name, getattr(self, name))) is not None:
                raise problem
        form = self.drawn()
        return GenerationRequest(
            prompt=self.prompt if prompt is None else prompt,
            max_tokens=self.max_tokens,
            sampling=SamplingParams(**{name: getattr(form, name) for name in _SAMPLING}),
            wishes=self.wishes,
        )

    @property
    def wishes(self) -> Wishes:
        """What the story is to have. Raises `InputError` that names the field."""
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(name, f"must be one of {', '.join(allowed)}, got {value!r}")
        if not isinstance(self.words, str):
            raise InputError("words", f"must be text, got {self.words!r}")
        chosen: dict[str, Any] = {
            "length": self.story_length,
            "dialogue": {"with": True, "without": False}.get(self.dialogue, ANY),
            "ending": self.ending,
        }
        wished = {name: value for name, value in chosen.items() if value != ANY}
        try:
            return Wishes(words=tuple(self.words.replace(",", " ").split()), **wished)
        except InputError as error:
            raise InputError("words", str(error).removeprefix(f"{error.param} ")) from None

    def problems(self) -> dict[str, str]:
        """What is wrong, by the field's label, in words for the user; empty when the form can be sent."""
        found = {name: check_field(name, getattr(self, name)) for name in FIELDS}
        return {LABELS[name]: labelled(problem) for name, problem in found.items() if problem is not None}


FIELDS: tuple[str, ...] = tuple(field.name for field in fields(Form))
"""Names in the order in which the page passes them."""

CHOICES: dict[str, tuple[str, ...]] = {
    "story_length": (ANY, *get_args(Length)),
    "dialogue": (ANY, "with", "without"),
    "ending": (ANY, *get_args(Ending)),
}
"""What the wishes can be that are chosen."""
WISHES = ("words", *CHOICES)

LABELS = {
    "prompt": "Prompt",
    "max_tokens": "Length",
    "temperature": "Temperature",
    "top_p": "Top-p",
    "top_k": "Top-k",
    "min_p": "Min-p",
    "repetition_penalty": "Repetition penalty",
    "words": "Words",
    "story_length": "Story length",
    "dialogue": "Dialogue",
    "ending": "Ending",
    "seed": "Seed",
}
"""What users call the fields. In small letters with hyphens, the ids of the page's elements."""

_NARROWER = {"max_tokens": (1, LONGEST), "seed": (0, MAX_SEED)}
"""Where the page allows less than the model does: lowest and highest value."""

_SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name in FIELDS)


def read_form(*values: Any) -> Form:
    """The form from the fields' values, in the order of `FIELDS`; an untouched text field counts as empty."""
    prompt, *others, seed = values
    if isinstance(seed, str):
        seed = int(seed) if re.fullmatch(r"\s*-?[0-9]{1,20}\s*", seed) else seed.strip() or None
    given = dict(zip(FIELDS[1:-1], others, strict=True))
    return Form(prompt=prompt or "", **given | {"words": given["words"] or ""}, seed=seed)


def labelled(problem: InputError) -> str:
    """The problem with a field, under the field's label: `Length must be …`."""
    return f"{LABELS.get(problem.param, problem.param)}{str(problem).removeprefix(problem.param)}"


def check_field(name: str, value: Any) -> InputError | None:
    """What is wrong with one field, judged without the others; None when nothing is."""
    if value is None and name == "seed":
        return None
    if value is None and name != "prompt":
        return InputError(name, "is empty; it needs a number")
    if name in _NARROWER and isinstance(value, int):
        low, high = _NARROWER[name]
        if not low <= value <= high:
            return InputError(name, f"must be a whole number between {low} and {high}, got {value}")
    try:
        if name in WISHES:
            _ = Form(**{name: value}).wishes
        elif name in _SAMPLING:
            SamplingParams(**{name: value})
        else:
            GenerationRequest(**{"prompt": "", name: value})
    except InputError as error:
        return error
    return None


MAX_QUERY = 16_000
"""Characters of a query string. Servers refuse a longer request line sooner or later; ours does at 64 KiB."""

VERSION_CHARS = 12
"""Leading characters of the model's digest that a link carries: 48 bits, enough to distinguish versions."""

_WHOLE = frozenset({"max_tokens", "top_k", "seed"})


def encode_link(form: Form, version: str) -> str:
    """The query string (without `?`) that reopens `form` as written by the model with digest `version`.

    Every field is written, defaults too, so that a link keeps its meaning when defaults change.
    Raises `InputError` when the prompt is too long to travel in an address.
    """
    values = {name: getattr(form, name) for name in FIELDS} | {"model": version[:VERSION_CHARS]}
    # A number as one would write it: 0.7, not 0.69999; 1, not 1.0.
    plain = {name: f"{value:.10g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    query = urlencode(plain, quote_via=quote)
    if len(query) > MAX_QUERY:
        raise InputError("prompt", "is too long to travel in a link")
    return query


def decode_link(query: Mapping[str, str], version: str) -> tuple[dict[str, Any], list[str]]:
    """Read a query string's usable values, by field, for the model with digest `version`.

    Return them with a sentence for each thing the user should know: a value left out, another model version. Unknown
    names are left alone.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    for name in FIELDS:
        if name not in query:
            continue
        value = _parse(name, query[name])
        problem = check_field(name, value)
        if problem is None:
            values[name] = value
        else:  # cut, for a hostile link would fill the page with it
            notes.append(f"A value of the link could not be used. {one_line(labelled(problem), 120)}.")
    if values and (linked := query.get("model", "")) and linked[:VERSION_CHARS] != version[:VERSION_CHARS]:
        notes.append("This link was made with another version of the model, so the story will differ.")
    return values, notes


def _parse(name: str, text: str) -> Any:
    """The value that `text` spells for this field, or `text` itself, which no number field accepts."""
    if name == "prompt" or name in WISHES:
        return text
    if not text.isascii() or "_" in text or len(text) > 40:
        return text
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        return text
