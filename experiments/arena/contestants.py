"""The contestants of the arena, as `STORY_ARENA` names them: `champion, challenger, champion?temperature=0.5`.

A contestant is a model, named as a variant of `STORY_SPLIT` is, with settings in the form of a query string: sampling
parameters, and wishes for a model that was trained to meet them. What is not given has the page's defaults.
"""

from typing import Annotated, Any, Self
from urllib.parse import parse_qsl, urlencode

from pydantic import BeforeValidator, Field, model_validator

from experiments.ab.assignment import DEFAULT_VARIANT, TrafficSplit
from model.errors import InputError
from model.generation import SamplingParams
from model.settings import OFF
from model.validation import Options
from model.wishes import Ending, Length, Wishes

SETTING = "STORY_ARENA"
MOST = 8
ALLOWED = f"must be 2 to {MOST} contestants such as champion, challenger?temperature=0.5, or {OFF}"
COOLER = 0.5
"""Temperature of the second contestant where nothing else is there to compare with."""
_USUAL = SamplingParams()
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


Words = Annotated[tuple[str, ...], BeforeValidator(lambda given: given.split() if isinstance(given, str) else given)]


class Contestant(Options):
    """A model with its settings. Raises `InputError` that names what is wrong."""

    model: str = Field(pattern=r"^[\w.~/@+:-]{1,200}$")
    temperature: float = _USUAL.temperature
    top_p: float = _USUAL.top_p
    top_k: int = _USUAL.top_k
    min_p: float = _USUAL.min_p
    repetition_penalty: float = _USUAL.repetition_penalty
    words: Words = ()
    length: Length | None = None
    dialogue: bool | None = None
    ending: Ending | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.sampling(0), self.wishes
        return self

    def sampling(self, seed: int) -> SamplingParams:
        """The parameters of a story with this seed."""
        return SamplingParams(**{name: getattr(self, name) for name in _SAMPLING}, seed=seed)

    @property
    def wishes(self) -> Wishes:
        """What the story is to have."""
        return Wishes(words=self.words, length=self.length, dialogue=self.dialogue, ending=self.ending)

    @property
    def settings(self) -> str:
        """All settings, those left at their defaults too."""
        wished = {name for name in ("words", "length", "dialogue", "ending") if getattr(self, name) not in ((), None)}
        return self._written([name for name in type(self).model_fields if name in {*_SAMPLING, *wished}])

    def __str__(self) -> str:
        """As it may be written in `STORY_ARENA`: `champion?temperature=0.5`."""
        given = [name for name in type(self).model_fields if name in self.model_fields_set - {"model"}]
        return f"{self.model}?{self._written(given)}" if given else self.model

    def _written(self, names: list[str]) -> str:
        def plain(value: Any) -> str:
            if isinstance(value, tuple):
                return " ".join(value)
            return f"{value:.10g}" if isinstance(value, float) else str(value).lower()

        return urlencode({name: plain(getattr(self, name)) for name in names})


def parse_contestants(text: str) -> tuple[Contestant, ...]:
    """Parse contestants with commas between. Raises `InputError` that names which one is wrong, and why."""
    found: list[Contestant] = []
    for part in text.split(","):
        model, _, query = part.strip().partition("?")
        given = parse_qsl(query, keep_blank_values=True)
        try:
            if len({name for name, _ in given}) < len(given) or any(name == "model" for name, _ in given):
                raise InputError("a setting", "may be given once")
            values: dict[str, Any] = dict(given)
            found.append(Contestant(model=model, **values))
        except InputError as error:
            raise InputError(SETTING, f"{ALLOWED}; of {part.strip()[:60]!r}, {error}") from None
    if not 2 <= len(found) <= MOST:
        raise InputError(SETTING, f"{ALLOWED}; got {len(found)}")
    if len({(each.model, each.settings) for each in found}) < len(found):
        raise InputError(SETTING, f"{ALLOWED}; two of them are the same")
    return tuple(found)


def contestants_of(setting: str | None, split: TrafficSplit) -> tuple[Contestant, ...]:
    """The contestants that `STORY_ARENA` names; none where it is `off`.

    Unset: the variants of a test, or the model that serves at two temperatures.
    """
    if setting is not None:
        return () if setting.strip().lower() == OFF else parse_contestants(setting)
    variants = [variant.name for variant in split.variants if variant.weight]
    if len(variants) > 1:
        return tuple(Contestant(model=name) for name in variants)
    model = variants[0] if variants else DEFAULT_VARIANT
    return tuple(Contestant(model=model, temperature=heat) for heat in (_USUAL.temperature, COOLER))
