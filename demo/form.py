"""The fields of the page's form: names, order and limits, the same for layout, handlers and links.

The limits are those of `model.generation`; the page narrows two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from model.errors import InputError
from model.generation import GenerationRequest, SamplingParams, new_seed

MAX_SEED = 2**53 - 1
"""The largest whole number that a browser's number field holds exactly (IEEE 754 double)."""

LONGEST = 1_024
"""Tokens at most of one press of Write: several times a usual story of the kind that the model knows."""

_USUAL = GenerationRequest(prompt="")


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
    seed: int | None = _USUAL.sampling.seed
    """None: a new one for each story."""

    def drawn(self) -> Form:
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
        )

    def problems(self) -> dict[str, str]:
        """What is wrong, by the field's label, in words for the user; empty when the form can be sent."""
        found = {name: check_field(name, getattr(self, name)) for name in FIELDS}
        return {LABELS[name]: labelled(problem) for name, problem in found.items() if problem is not None}


FIELDS: tuple[str, ...] = tuple(field.name for field in fields(Form))
"""Names in the order in which the page passes them."""

LABELS = {
    "prompt": "Prompt",
    "max_tokens": "Length",
    "temperature": "Temperature",
    "top_p": "Top-p",
    "top_k": "Top-k",
    "min_p": "Min-p",
    "repetition_penalty": "Repetition penalty",
    "seed": "Seed",
}
"""What users call the fields. In small letters with hyphens, the ids of the page's elements."""

_NARROWER = {"max_tokens": (1, LONGEST), "seed": (0, MAX_SEED)}
"""Where the page allows less than the model does: lowest and highest value."""

_SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name in FIELDS)


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
        if name in _SAMPLING:
            SamplingParams(**{name: value})
        else:
            GenerationRequest(**{"prompt": "", name: value})
    except InputError as error:
        return error
    return None
