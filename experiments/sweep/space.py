"""What a sweep searches: a YAML file of recipe keys with their ranges or choices, read and checked once.

A mistyped key or a range that the recipe refuses would be found out only by the trial that draws it, hours later.
So each key is held to the recipe's fields, and each bound and choice is put into a recipe when the file is read; what
is wrong is told with file, line and key.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experiments.common.yaml_file import YamlFile, read_yaml
from model.architecture.config import ModelConfig
from model.errors import InputError, StoryError
from training.trainer.recipe import OptimizerRecipe, Recipe, load_recipe, overridden

SPACES = Path(__file__).with_name("spaces")
DEFAULT_SPACE = SPACES / "small.yaml"
"""The project's own."""

FIXED = (
    "name", "seed", "steps", "minutes", "eval_every", "eval_stories", "patience", "save_every", "samples",
    "model.vocab_size",
)  # fmt: skip
"""Fields that are no choice of a recipe: the budget and how a trial is judged are equal for all trials."""

Value = bool | int | float | str


class SpaceError(StoryError):
    """A file of a search space is unusable; the message names the file and, where there is one, the line."""


class Dimension(BaseModel):
    """What one field of the recipe may be: a range from `low` to `high`, or one of `choices`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Draw the logarithm evenly, for what is multiplied rather than added (rates)."""
    step: int | float | None = Field(default=None, gt=0)
    choices: tuple[Value, ...] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("choices: stand alone, without low, high, log or step")
            if len(set(map(repr, self.choices))) < max(2, len(self.choices)):
                raise ValueError(f"choices: must be at least two different values, got {[*self.choices]}")
            return self
        if self.low is None or self.high is None:
            raise ValueError(f"{'high' if self.low is not None else 'low'}: is missing (or give choices)")
        if not self.low < self.high:
            raise ValueError(f"low: must be below high={self.high}, got {self.low}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: must be above 0 where log is true, got {self.low}")
        if self.log and self.step is not None:
            raise ValueError("step: cannot be given with log")
        if self.step is not None and not _whole((self.high - self.low) / self.step):
            raise ValueError(f"step: {self.step} must lead from low={self.low} to high={self.high}")
        return self

    @property
    def tried(self) -> tuple[Value, ...]:
        """The values at which it is checked: its ends, or all of them."""
        return self.choices if self.choices is not None else (self.low or 0, self.high or 0)

    def holds(self, value: object) -> bool:
        """Whether `value` can be drawn."""
        if self.choices is not None:
            return any(value == one and type(value) is type(one) for one in self.choices)
        if not isinstance(value, int | float) or not (self.low or 0) <= value <= (self.high or 0):
            return False
        return self.step is None or _whole((value - (self.low or 0)) / self.step)


class Prune(BaseModel):
    """When a trial that falls behind is ended early."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    by: Literal["median", "hyperband", "none"] = "median"
    after_trials: int = Field(default=4, ge=1)
    """Trials that must have ended before `median` ends another early."""
    after_eighths: int = Field(default=2, ge=1, le=7)
    """Eighths of the budget that every trial is given."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    preset: str | None = None
    recipe: str | None = None
    set: dict[str, Any] = {}
    search: dict[str, Any]
    prune: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Space:
    """A recipe, and what of it is searched."""

    base: Recipe
    """The recipe that trials differ from, with the file's `set` in it."""
    origin: tuple[str, ...]
    """How `story train` names the file's recipe: `--preset NAME` or `--config FILE`, and its `set` as `key=value`."""
    dimensions: dict[str, Dimension]
    prune: Prune

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """The recipe with these values. Raises `InputError` where they do not fit together."""
        return Recipe.from_dict(overridden(self.base.as_dict(), as_overrides(values)))

    def base_values(self) -> dict[str, Value] | None:
        """The values of the recipe as it stands; `None` where one of them cannot be drawn."""
        values = {name: _field(self.base.as_dict(), name) for name in self.dimensions}
        inside = all(dimension.holds(values[name]) for name, dimension in self.dimensions.items())
        return values if inside else None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "base": self.base.as_dict(),
            "origin": list(self.origin),
            "search": {
                name: dimension.model_dump(mode="json", exclude_defaults=True)
                for name, dimension in self.dimensions.items()
            },
            "prune": self.prune.model_dump(mode="json"),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Space:
        """The reverse of `as_dict`."""
        return cls(
            Recipe.from_dict(values["base"]),
            tuple(values["origin"]),
            {name: Dimension.model_validate(one) for name, one in values["search"].items()},
            Prune.model_validate(values["prune"]),
        )


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as `story train` takes them: `optimizer.matrix_lr=0.01`."""
    return [f"{name}={_as_text(value)}" for name, value in values.items()]


def load_space(path: Path = DEFAULT_SPACE) -> Space:
    """Read and check a search space.

    Raises:
        SpaceError: the file cannot be read, is not YAML, or names a key or value that no recipe has; the message
            names file, line and key.
        MissingExtraError: PyYAML is not installed.
    """
    file = read_yaml(path, SpaceError, "a search space")
    if not isinstance(file.value, dict):
        raise SpaceError(f"{file.at(())}: must be a mapping with 'search' in it")
    try:
        content = _File.model_validate(file.value)
    except ValidationError as error:
        raise SpaceError(file.blame(error, ())) from None
    plain, origin = _named_recipe(file, content)
    base = plain
    for name, value in content.set.items():
        place = ("set", name)
        if name in content.search:
            raise SpaceError(f"{file.at(place)}: {name} is set and searched as well")
        base = _with(file, base, name, value, place)
    try:
        prune = Prune.model_validate(content.prune)
    except ValidationError as error:
        raise SpaceError(file.blame(error, ("prune",))) from None
    if not content.search:
        raise SpaceError(f"{file.at(('search',))}: search holds no key, so there is nothing to search")
    dimensions = {name: _dimension(file, base, name, entry) for name, entry in content.search.items()}
    return Space(base, (*origin, *as_overrides(content.set)), dimensions, prune)


def _named_recipe(file: YamlFile, content: _File) -> tuple[Recipe, tuple[str, ...]]:
    if (content.preset is None) == (content.recipe is None):
        raise SpaceError(f"{file.path}: must name a preset or a recipe file (preset: small), and not both")
    name = "preset" if content.preset is not None else "recipe"
    config = None if content.recipe is None else file.path.parent / content.recipe
    try:
        recipe = load_recipe(content.preset, config)
    except InputError as error:
        raise SpaceError(f"{file.at((name,))}: {error}") from None
    origin = ("--config", str(config)) if config is not None else ("--preset", str(content.preset))
    return recipe, origin


def _dimension(file: YamlFile, base: Recipe, name: str, entry: Any) -> Dimension:
    place = ("search", name)
    known = _fields()
    if name not in known or name in FIXED:
        why = "is equal for all trials and cannot be searched" if name in known else "is no field of a recipe"
        allowed = ", ".join(field for field in known if field not in FIXED)
        raise SpaceError(f"{file.at(place)}: {name} {why}; allowed are {allowed}")
    if not isinstance(entry, dict):
        raise SpaceError(f"{file.at(place)}: {name} must be {{low, high, log, step}} or {{choices}}")
    try:
        dimension = Dimension.model_validate(entry)
    except ValidationError as error:
        raise SpaceError(file.blame(error, place).replace(": ", f": {name}: ", 1)) from None
    if dimension.choices is None and known[name] not in (int, float):
        raise SpaceError(f"{file.at(place)}: {name} is no number and needs choices")
    for bound in ("low", "high", "step"):
        value = getattr(dimension, bound)
        if known[name] is int and isinstance(value, float):
            raise SpaceError(f"{file.at((*place, bound))}: {name}: {bound} must be whole, got {value}")
    if known[name] is float and dimension.choices is None:
        # Written as `0`, meant as a number: what is drawn from it is one.
        ends = {bound: float(getattr(dimension, bound)) for bound in ("low", "high")}
        dimension = dimension.model_copy(update=ends)
    for key, value in zip(
        ("low", "high") if dimension.choices is None else (), dimension.tried, strict=False
    ):
        _with(file, base, name, value, (*place, key))
    for number, value in enumerate(dimension.choices or ()):
        _with(file, base, name, value, (*place, "choices", number))
    return dimension


def _with(file: YamlFile, base: Recipe, name: str, value: Any, place: tuple[str | int, ...]) -> Recipe:
    """The recipe with one field changed, or what is wrong with that in this file."""
    try:
        return Recipe.from_dict(overridden(base.as_dict(), as_overrides({name: value})))
    except InputError as error:
        raise SpaceError(f"{file.at(place)}: {name}: {error}") from None


def _whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-9


def _fields() -> dict[str, Any]:
    """Dotted name → type of each field of a recipe."""
    fields: dict[str, Any] = {}
    for prefix, record in (("", Recipe), ("model.", ModelConfig), ("optimizer.", OptimizerRecipe)):
        fields |= {prefix + name: kind for name, kind in get_type_hints(record).items()}
    return {name: kind for name, kind in fields.items() if name not in ("model", "optimizer")}


def _field(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _as_text(value: Any) -> str:
    """A value as TOML, texts without marks where they cannot be taken for something else."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return json.dumps(value, ensure_ascii=False)
