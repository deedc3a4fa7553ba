"""The plan of a sweep: what is searched, each trial's budget, and the data. It is stored with the study.

The search space is a YAML file of recipe fields with ranges or choices. A mistyped field or an impossible range would
otherwise fail only in the trial that draws it, hours later; so Optuna checks each entry, and each bound and choice is
put into a recipe, when the file is read. Errors name file, line and field.
"""

from __future__ import annotations

import json
import math
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from experiments.common.yaml_file import Place, read_yaml
from model.errors import InputError, StoryError
from training.trainer.recipe import Recipe, load_recipe, overridden

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner

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

Entry = dict[str, Any]
"""What one field may be: Optuna's `low`, `high`, `log` and `step`, or its `choices`."""


class SpaceError(StoryError):
    """A file of a search space is unusable; the message names the file and, where there is one, the line."""


class Prune(BaseModel):
    """When a trial that falls behind is ended early."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    by: Literal["median", "hyperband", "none"] = "median"
    after_trials: int = Field(default=4, ge=1)
    """Trials that must have ended before `median` prunes another."""
    after_eighths: int = Field(default=2, ge=1, le=7)
    """Eighths of the budget that every trial is given."""

    def pruner(self) -> BasePruner:
        """Return Optuna's pruner, whose steps are eighths of the budget."""
        from optuna import pruners

        match self.by:
            case "median":
                return pruners.MedianPruner(self.after_trials, self.after_eighths)
            case "hyperband":
                return pruners.HyperbandPruner(self.after_eighths, PARTS, reduction_factor=2)
            case _:
                return pruners.NopPruner()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    preset: str | None = None
    recipe: str | None = None
    set: Entry = {}
    search: dict[str, Entry] = Field(min_length=1)
    prune: Prune = Prune()


class Space(BaseModel):
    """A recipe, and which of its fields are searched."""

    base: Annotated[
        Recipe, BeforeValidator(lambda value: Recipe.from_dict(value) if isinstance(value, dict) else value)
    ]
    """The recipe that trials differ from, with the file's `set` applied."""
    origin: tuple[str, ...]
    """The same as arguments of `story train`: `--preset NAME` or `--config FILE`, and `set` as `key=value`."""
    search: dict[str, Entry]
    prune: Prune


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

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """Return the whole recipe of a trial. Raises `InputError` where its values do not fit together."""
        return self.budget.given_to(changed(self.space.base, values), self.space.base)


def part_of(recipe: Recipe, step: int, elapsed: float) -> int:
    """Return how many eighths of a recipe's budget are used, 0 to 8. `elapsed` is in seconds."""
    share = step / recipe.steps
    if recipe.minutes is not None:
        share = max(share, elapsed / (recipe.minutes * 60))
    return min(PARTS, int(share * PARTS))


def kind_of(entry: Entry) -> Literal["categorical", "int", "float"]:
    """Return which of Optuna's `suggest_*` takes this entry as its arguments."""
    if "choices" in entry:
        return "categorical"
    numbers = [value for key, value in entry.items() if key != "log"]
    return "int" if all(isinstance(number, int) for number in numbers) else "float"


def distribution_of(entry: Entry) -> BaseDistribution:
    """Return an entry as Optuna's distribution. Raises `ValueError` where Optuna does not accept it."""
    from optuna import distributions

    kind = getattr(distributions, f"{kind_of(entry).capitalize()}Distribution")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna only warns of a step that does not lead from low to high
        try:
            made: BaseDistribution = kind(**entry)
        except TypeError:
            raise ValueError("must be {low, high, log, step} with numbers, or {choices} with a list") from None
        except UserWarning as warning:
            raise ValueError(str(warning)) from None
    if made.single():
        raise ValueError("must allow at least two different values")
    return made


def value_of(recipe: Recipe, name: str) -> Any:
    """Return a field of a recipe by its dotted name."""
    value: Any = recipe.as_dict()
    for part in name.split("."):
        value = value[part]
    return value


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with these fields changed. Raises `InputError` where one is unknown or not allowed."""
    return Recipe.from_dict(overridden(recipe.as_dict(), as_overrides(values)))


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
    try:
        content = _File.model_validate(file.value)
    except ValidationError as error:
        raise SpaceError(file.blame(error, ())) from None
    if (content.preset is None) == (content.recipe is None):
        raise SpaceError(f"{path}: must name a preset or a recipe file (preset: small), and not both")
    config = None if content.recipe is None else path.parent / content.recipe
    place: Place = ("recipe" if config else "preset",)
    try:
        base = load_recipe(content.preset, config)
        for name, value in content.set.items():
            place = ("set", name)
            if name in content.search:
                raise InputError(name, "is both set and searched")
            base = changed(base, {name: value})
        for name, entry in content.search.items():
            place = ("search", name)
            if name in FIXED:
                raise InputError(name, "is equal for all trials and cannot be searched")
            try:
                distribution_of(entry)
            except ValueError as error:
                raise InputError(f"{name}:", str(error)) from None
            ends: dict[Place, Any] = {(key,): entry[key] for key in ("low", "high") if key in entry}
            for where, value in (ends or {("choices", n): one for n, one in enumerate(entry["choices"])}).items():
                place = ("search", name, *where)
                changed(base, {name: value})
            if ends and isinstance(value_of(base, name), float):
                # A bound written as `0` means a number: draws must be floats.
                entry.update({key: float(bound) for key, bound in entry.items() if key != "log"})
    except InputError as error:
        raise SpaceError(f"{file.at(place)}: {error}") from None
    origin = ("--config", str(config)) if config else ("--preset", str(content.preset))
    overrides = as_overrides(content.set)
    return Space(base=base, origin=(*origin, *overrides), search=content.search, prune=content.prune)


def _as_toml(value: Any) -> str:
    """Return a value as TOML; text is quoted only where it could be read as something else."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return json.dumps(value, ensure_ascii=False)
