"""A training recipe: every choice of a run in one frozen record, read from a TOML file and checked once.

Presets are the files in `training/recipes/`; `optimizer.matrix_lr=0.01` on the command line overrides one value.
"""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from model.architecture.folder import ModelConfig
from model.errors import InputError, ModelError
from model.validation import fault_of, read_number

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Precision = Literal["auto", "bf16", "fp32"]
OptimizerName = Literal["muon", "adamw"]

Positive = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Rate = Annotated[float, Field(strict=True, ge=0, le=10)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
OpenShare = Annotated[float, Field(strict=True, ge=0, lt=1)]
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False)


def _sizes(values: Any) -> Any:
    """A table of sizes as `ModelConfig`, which checks them itself."""
    try:
        return ModelConfig.from_dict(values) if isinstance(values, dict) else values
    except ModelError as error:
        raise InputError("recipe", f"has a bad model table: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True, config=CONFIG)
class OptimizerRecipe:
    """Muon for the matrices inside the blocks, AdamW for all else; or AdamW for everything."""

    name: OptimizerName = "muon"
    matrix_lr: Rate = 0.02
    """Peak rate of the matrices inside blocks."""
    table_lr: Rate = 0.008
    """Peak rate of the embedding (always AdamW)."""
    vector_lr: Rate = 0.008
    """Peak rate of gains, biases, convolutions and decays (always AdamW)."""
    momentum: OpenShare = 0.95
    """Muon's."""
    beta1: OpenShare = 0.9
    beta2: OpenShare = 0.95
    weight_decay: Rate = 0.02
    """Of the matrices inside blocks, scaled by the learning rate."""
    table_decay: Rate = 0.0
    """Of the embedding, scaled by the learning rate."""
    clip: float = Field(default=1.0, strict=True, ge=0, le=1e9)
    """Bound on the gradient's norm over all parameters; 0 is none."""
    warmup_steps: Whole = 20
    warmdown: Share = 0.6
    """Share of the budget over which the rate falls in a line to `final_lr`."""
    final_lr: Share = 0.0
    """As a share of the peak."""


@dataclass(frozen=True, slots=True, kw_only=True, config=CONFIG)
class Recipe:
    """Every choice of a training run. Read it with `from_dict` or `load_recipe`, which name what is wrong."""

    name: str = Field(default="custom", min_length=1)
    seed: Whole = 0
    model: Annotated[ModelConfig, BeforeValidator(_sizes)] = Field(default_factory=ModelConfig)
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe)
    row_tokens: int = Field(default=512, strict=True, ge=8)
    """Length of a packed row of whole stories."""
    rows: Positive = 16
    """Rows in one optimiser step, over all processes. With `minutes` too few for 60 such steps, the first steps have
    fewer."""
    micro_rows: Positive = 8
    """Rows in one forward pass of one process, or with few `minutes` a part of them; gradients are accumulated."""
    steps: Positive = 2000
    """The run ends here, or when its minutes are used, whichever comes first."""
    minutes: Annotated[float, Field(strict=True, gt=0)] | None = None
    """Wall-clock budget; the learning rate then follows the clock. None: `steps` alone."""
    eval_every: Positive = 100
    """Steps between evaluations. With `minutes`, there is one at each eighth of them as well, and each waits until all
    of them and the checkpoints take at most a quarter of the time."""
    eval_stories: Whole = 400
    """Validation stories in each evaluation (the first ones); 0 is all."""
    patience: Whole = 0
    """Stop after this many evaluations without a better one; 0 never stops early."""
    save_every: Positive = 100
    """Steps between resumable checkpoints; there is also one after each evaluation and at the end."""
    dropout: OpenShare = 0.0
    """Share of the embedded tokens' and of each branch's values that is dropped in training; 0 drops none."""
    replace: OpenShare = 0.0
    """Share of the input tokens (never story ends) that are replaced by random ones in training. It falls with the
    learning rate, so that the last steps read clean text. A cheap alternative to dropout (arXiv 2606.16246)."""
    average: OpenShare = 0.0
    """Of an average of the weights over steps: the share of itself that it keeps at a step. The average is what
    is validated and kept as the best. 0 keeps none: the weights themselves are."""
    ages: int = Field(default=12, strict=True, ge=0, le=100)
    """Networks of the run that are kept in MLflow, in half precision, so that a prompt can be continued by each: the
    first before the first step, the others evenly on a logarithmic scale of the budget. Behind the first evaluation
    each waits for the next one. 0 keeps none."""
    precision: Precision = "auto"
    """Of the matrix products in training; `auto` is bf16 where the processor has instructions for it."""
    compile: StrictBool = True
    """Use torch.compile (about a minute at the start)."""
    samples: tuple[str, ...] = ("Once upon a time", "Lily and Ben went to the park.", "The little robot")
    """Prompts continued at each evaluation."""

    @model_validator(mode="after")
    def _whole_passes(self) -> Self:
        if self.rows % self.micro_rows:
            raise InputError("micro_rows", f"must divide rows={self.rows}, got {self.micro_rows}")
        return self

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The reverse of `as_dict`. Raises `InputError` that names the bad value and what is allowed."""
        for prefix, record, given in (("", cls, values), ("optimizer.", OptimizerRecipe, values.get("optimizer"))):
            known = [field.name for field in dataclasses.fields(record)]
            if isinstance(given, dict) and (unknown := sorted(given.keys() - known)):
                raise InputError(prefix + unknown[0], f"is not known; allowed are {', '.join(known)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(*fault_of(error)) from None


def preset_names() -> list[str]:
    """The presets that `story train --preset` knows."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(preset: str | None = None, config: Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """A preset or a TOML file (not both; neither is the preset `small`), with `name=value` overrides on top.

    Raises:
        InputError: an unknown preset or name, a value that is not allowed, a file that is not TOML.
    """
    if preset and config:
        raise InputError("preset", "and config cannot both be given")
    if config is None:
        preset = preset or "small"
        if preset not in preset_names():
            raise InputError("preset", f"must be one of {', '.join(preset_names())}, got {preset!r}")
        config = RECIPES / f"{preset}.toml"
    try:
        values = tomllib.loads(config.read_text("utf-8"), parse_float=_as_number)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("config", f"{config} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError("config", f"{config} is not valid TOML: {error}") from None
    values.setdefault("name", config.stem)
    return Recipe.from_dict(overridden(values, overrides or []))


def _as_number(text: str) -> int | float:
    number = read_number(text)
    return float(text) if number is None else number  # inf and nan


def overridden(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A recipe's nested values (as `Recipe.as_dict` gives them) with `name=value` overrides put in.

    Raises:
        InputError: an override is not of that form, or its dotted name leads through a plain value.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise InputError("override", f"must be name=value (model.pattern=AAAAAA), got {override!r}")
        try:
            value: Any = tomllib.loads(f"value = {text}", parse_float=_as_number)["value"]
        except tomllib.TOMLDecodeError:
            number = read_number(text.strip())
            value = text if number is None else number
        *tables, last = name.strip().split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise InputError(name, "is not a table in this recipe")
        target[last] = value
    return values
