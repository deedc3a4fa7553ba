"""The plan of a sweep: what is searched, each trial's budget, and the data. It is stored with the study.

The search space is a YAML file of recipe fields with ranges or choices. A mistyped field or an impossible range would
otherwise fail only in the trial that draws it, hours later; so each field is checked against the recipe, and each bound
and choice is put into a recipe when the file is read. Errors name file, line and field.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from experiments.common.yaml_file import Place, YamlFile, read_yaml
from model.architecture.config import ModelConfig
from model.errors import InputError, StoryError
from training.trainer.recipe import OptimizerRecipe, Recipe, load_recipe, overridden

SPACES = Path(__file__).with_name("spaces")
DEFAULT_SPACE = SPACES / "small.yaml"
PARTS = 8
"""Each trial is evaluated after each eighth of its budget, which is where trials are compared."""
NEVER = 10**9
"""Steps that no trial makes."""
FIXED = (
    *("name", "seed", "steps", "minutes", "eval_every", "eval_stories"),
    *("patience", "save_every", "samples", "model.vocab_size"),
)
"""Fields that cannot be searched: the budget and the evaluation are equal for all trials."""

Value = bool | int | float | str


class SpaceError(StoryError):
    """A file of a search space is unusable; the message names the file and, where there is one, the line."""


class Dimension(BaseModel):
    """What one field of the recipe may be: a range from `low` to `high`, or one of `choices`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Draw on a logarithmic scale, for what is multiplied rather than added (rates)."""
    step: int | float | None = Field(default=None, gt=0)
    choices: tuple[Value, ...] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
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
        if self.step is not None and not _is_whole((self.high - self.low) / self.step):
            raise ValueError(f"step: {self.step} must lead from low={self.low} to high={self.high}")
        return self

    @property
    def extremes(self) -> dict[Place, Value]:
        """The values to try in a recipe, by their place in the file: both ends, or all choices."""
        if self.choices is not None:
            return {("choices", number): value for number, value in enumerate(self.choices)}
        return {("low",): self.low or 0, ("high",): self.high or 0}

    def contains(self, value: object) -> bool:
        """Whether `value` can be drawn."""
        if self.choices is not None:
            return any(value == one and type(value) is type(one) for one in self.choices)
        if not isinstance(value, int | float) or not (self.low or 0) <= value <= (self.high or 0):
            return False
        return self.step is None or _is_whole((value - (self.low or 0)) / self.step)


class Prune(BaseModel):
    """When a trial that falls behind is ended early."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    by: Literal["median", "hyperband", "none"] = "median"
    after_trials: int = Field(default=4, ge=1)
    """Trials that must have ended before `median` prunes another."""
    after_eighths: int = Field(default=2, ge=1, le=7)
    """Eighths of the budget that every trial is given."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    preset: str | None = None
    recipe: str | None = None
    set: dict[str, Any] = {}
    search: dict[str, Any]
    prune: dict[str, Any] = {}


def _as_recipe(value: Any) -> Any:
    return Recipe.from_dict(value) if isinstance(value, dict) else value


class Space(BaseModel):
    """A recipe, and which of its fields are searched."""

    base: Annotated[Recipe, BeforeValidator(_as_recipe)]
    """The recipe that trials differ from, with the file's `set` applied."""
    origin: tuple[str, ...]
    """The same as arguments of `story train`: `--preset NAME` or `--config FILE`, and `set` as `key=value`."""
    search: dict[str, Dimension]
    prune: Prune

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the recipe with these values. Raises `InputError` where they do not fit together."""
        return Recipe.from_dict(overridden(self.base.as_dict(), as_overrides(values)))

    def base_values(self) -> dict[str, Value] | None:
        """Return the base recipe's own values of the searched fields; None where one of them cannot be drawn."""
        values = {}
        for name, dimension in self.search.items():
            value: Any = self.base.as_dict()
            for part in name.split("."):
                value = value[part]
            if not dimension.contains(value):
                return None
            values[name] = value
        return values


class Budget(BaseModel):
    """What each trial may use: minutes by the clock, or `steps` of the base recipe.

    A trial with larger batches makes fewer steps, so that all see equally many tokens.
    """

    minutes: float | None = None
    steps: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.minutes is None) == (self.steps is None):
            raise InputError("budget", "must be given for each trial: --minutes or --steps, not both")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise InputError("minutes", f"must be above 0, got {self.minutes}")
        if self.steps is not None and self.steps < PARTS:
            raise InputError("steps", f"must be at least {PARTS}, one for each evaluation, got {self.steps}")
        return self

    def given_to(self, recipe: Recipe, base: Recipe) -> Recipe:
        """Return the recipe with this budget and `PARTS` evaluations, the last one at its end."""
        steps, every = NEVER, NEVER
        if self.steps is not None:
            tokens = self.steps * base.rows * base.row_tokens
            steps = max(PARTS, round(tokens / (recipe.rows * recipe.row_tokens)))
            every = math.ceil(steps / PARTS)
        budget = {"minutes": self.minutes, "steps": steps, "eval_every": every, "patience": 0}
        return Recipe.from_dict(recipe.as_dict() | budget)

    def __str__(self) -> str:
        return f"{self.minutes:g} minutes" if self.minutes is not None else f"{self.steps} steps"


class Plan(BaseModel):
    """What all trials of a sweep share. Only trials of one plan can be compared."""

    space: Space
    budget: Budget
    data: str
    """Folder of token shards; on Modal, its name on the Volume."""
    digest: str | None
    """Of the shards; None: not known before the first trial, because they are on Modal."""
    place: Literal["here", "modal"]
    """Where trials run: equal minutes on unlike machines are unlike budgets."""
    seed: int = 0
    """Of the sampler. The trials' own seed is the recipe's, and equal for all."""

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the whole recipe of a trial. Raises `InputError` where its values do not fit together."""
        return self.budget.given_to(self.space.recipe(values), self.space.base)

    def folder(self, out: Path, first: int) -> Path:
        """Return the checkpoint folder of a trial, given its number or that of its first attempt."""
        return out / f"trial-{first:04d}"


def part_of(recipe: Recipe, step: int, elapsed: float) -> int:
    """Return how many eighths of a recipe's budget are used, 0 to 8. `elapsed` is in seconds."""
    share = step / recipe.steps
    if recipe.minutes is not None:
        share = max(share, elapsed / (recipe.minutes * 60))
    return min(PARTS, int(share * PARTS))


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return values as arguments of `story train`: `optimizer.matrix_lr=0.01`."""
    return [f"{name}={_as_toml(value)}" for name, value in values.items()]


def load_space(path: Path = DEFAULT_SPACE) -> Space:
    """Read and check a search space.

    Raises:
        SpaceError: the file cannot be read, is not YAML, or names a key or value that no recipe has.
        MissingExtraError: PyYAML is not installed.
    """
    file = read_yaml(path, SpaceError, "a search space")
    if not isinstance(file.value, dict):
        raise SpaceError(f"{file.at(())}: must be a mapping with 'search' in it")
    try:
        content = _File.model_validate(file.value)
    except ValidationError as error:
        raise SpaceError(file.blame(error, ())) from None
    base, origin = _named_recipe(file, content)
    for name, value in content.set.items():
        if name in content.search:
            raise SpaceError(f"{file.at(('set', name))}: {name} is both set and searched")
        base = _with(file, base, name, value, ("set", name))
    try:
        prune = Prune.model_validate(content.prune)
    except ValidationError as error:
        raise SpaceError(file.blame(error, ("prune",))) from None
    if not content.search:
        raise SpaceError(f"{file.at(('search',))}: search names no field")
    search = {name: _dimension(file, base, name, entry) for name, entry in content.search.items()}
    return Space(base=base, origin=(*origin, *as_overrides(content.set)), search=search, prune=prune)


def _named_recipe(file: YamlFile, content: _File) -> tuple[Recipe, tuple[str, ...]]:
    if (content.preset is None) == (content.recipe is None):
        raise SpaceError(f"{file.path}: must name a preset or a recipe file (preset: small), and not both")
    config = None if content.recipe is None else file.path.parent / content.recipe
    try:
        recipe = load_recipe(content.preset, config)
    except InputError as error:
        raise SpaceError(f"{file.at(('recipe' if config else 'preset',))}: {error}") from None
    return recipe, ("--config", str(config)) if config else ("--preset", str(content.preset))


def _dimension(file: YamlFile, base: Recipe, name: str, entry: Any) -> Dimension:
    place: Place = ("search", name)
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
        # A bound written as `0` means a number: draws must be floats.
        ends = {bound: float(getattr(dimension, bound)) for bound in ("low", "high")}
        dimension = dimension.model_copy(update=ends)
    for where, value in dimension.extremes.items():
        _with(file, base, name, value, (*place, *where))
    return dimension


def _with(file: YamlFile, base: Recipe, name: str, value: Any, place: Place) -> Recipe:
    """Return the recipe with one field changed; `SpaceError` names the place in the file."""
    try:
        return Recipe.from_dict(overridden(base.as_dict(), as_overrides({name: value})))
    except InputError as error:
        raise SpaceError(f"{file.at(place)}: {name}: {error}") from None


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-9


def _fields() -> dict[str, Any]:
    """Return the type of each field of a recipe by its dotted name."""
    fields: dict[str, Any] = {}
    for prefix, record in (("", Recipe), ("model.", ModelConfig), ("optimizer.", OptimizerRecipe)):
        fields |= {prefix + name: kind for name, kind in get_type_hints(record).items()}
    return {name: kind for name, kind in fields.items() if name not in ("model", "optimizer")}


def _as_toml(value: Any) -> str:
    """Return a value as TOML; text is quoted only where it could be read as something else."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return json.dumps(value, ensure_ascii=False)
