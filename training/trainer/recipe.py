"""A training recipe: every choice of a run in one frozen record, read from a TOML file and checked once.

A preset is a file in `training/recipes/`; its name is the file's. Single values are overridden on the command
line by their dotted name (`optimizer.matrix_lr=0.01 model.pattern=AAAAAA`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from model.architecture.config import ModelConfig
from model.errors import InputError, ModelError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
Precision = Literal["auto", "bf16", "fp32"]
OptimizerName = Literal["muon", "adamw"]
_HIGHEST = {
    "matrix_lr": 10, "table_lr": 10, "vector_lr": 10, "weight_decay": 10, "clip": 1e9, "warmdown": 1,
    "final_lr": 1, "momentum": 1, "beta1": 1, "beta2": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRecipe:
    """Muon for the matrices inside the blocks, AdamW for all else; or AdamW for everything.

    Raises `InputError` that names the bad value and what is allowed.
    """

    name: OptimizerName = "muon"
    matrix_lr: float = 0.02
    """Peak rate of the matrices inside blocks."""
    table_lr: float = 0.008
    """Peak rate of the embedding (always AdamW)."""
    vector_lr: float = 0.008
    """Peak rate of gains, biases, convolutions and decays (always AdamW)."""
    momentum: float = 0.95
    """Muon's."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.02
    """Of the matrices inside blocks, scaled by the learning rate."""
    clip: float = 1.0
    """Bound on the gradient's norm over all parameters; 0 is none."""
    warmup_steps: int = 20
    warmdown: float = 0.6
    """Share of the budget over which the rate falls in a line to `final_lr`."""
    final_lr: float = 0.0
    """As a share of the peak."""

    def __post_init__(self) -> None:
        _check_choice("optimizer.name", self.name, get_args(OptimizerName))
        _check_whole("optimizer.warmup_steps", self.warmup_steps, 0)
        for name, high in _HIGHEST.items():
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= high:
                raise InputError(f"optimizer.{name}", f"must be between 0 and {high:g}, got {value!r}")
        for name in ("momentum", "beta1", "beta2"):
            if (value := getattr(self, name)) == 1:
                raise InputError(
                    f"optimizer.{name}", f"must be below 1 (which would never move), got {value!r}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Raises `InputError` that names the bad value and what is allowed."""

    name: str = "custom"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    row_tokens: int = 512
    """Length of a packed row of whole stories."""
    rows: int = 16
    """Rows in one optimiser step, over all processes."""
    micro_rows: int = 8
    """Rows in one forward pass of one process; gradients are accumulated over `rows`."""
    steps: int = 2000
    """The run ends here, or when its minutes are used, whichever comes first."""
    minutes: float | None = None
    """Wall-clock budget; the learning rate then follows the clock. None: `steps` alone."""
    eval_every: int = 100
    """Steps between evaluations; with `minutes`, there is one at each eighth of them as well."""
    eval_stories: int = 400
    """Validation stories in each evaluation (the first ones); 0 is all."""
    patience: int = 0
    """Stop after this many evaluations without a better one; 0 never stops early."""
    save_every: int = 100
    """Steps between resumable checkpoints; there is also one after each evaluation and at the end."""
    dropout: float = 0.0
    """Share of the embedded tokens' and of each branch's values that is dropped in training; 0 drops none."""
    average: float = 0.0
    """Of an average of the weights over steps: the share of itself that it keeps at a step. The average is what
    is validated and kept as the best. 0 keeps none: the weights themselves are."""
    precision: Precision = "auto"
    """Of the matrix products in training; `auto` is bf16 where the processor has instructions for it."""
    compile: bool = True
    """Use torch.compile (about a minute at the start)."""
    samples: tuple[str, ...] = ("Once upon a time", "Lily and Ben went to the park.", "The little robot")
    """Prompts continued at each evaluation."""

    def __post_init__(self) -> None:
        for name in ("row_tokens", "rows", "micro_rows", "steps", "eval_every", "save_every"):
            _check_whole(name, getattr(self, name), 8 if name == "row_tokens" else 1)
        for name in ("eval_stories", "patience", "seed"):
            _check_whole(name, getattr(self, name), 0)
        for name in ("dropout", "average"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise InputError(name, f"must be at least 0 and below 1, got {value!r}")
        if self.rows % self.micro_rows:
            raise InputError("micro_rows", f"must divide rows={self.rows}, got {self.micro_rows}")
        _check_choice("precision", self.precision, get_args(Precision))
        if not isinstance(self.compile, bool):
            raise InputError("compile", f"must be true or false, got {self.compile!r}")
        if not isinstance(self.name, str) or not self.name:
            raise InputError("name", f"must be a text that is not empty, got {self.name!r}")
        if self.minutes is not None and not (_is_number(self.minutes) and self.minutes > 0):
            raise InputError("minutes", f"must be a number above 0, got {self.minutes!r}")
        if not isinstance(self.samples, tuple) or not all(isinstance(text, str) for text in self.samples):
            raise InputError("samples", f"must be a list of texts, got {self.samples!r}")

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as in a recipe file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The reverse of `as_dict`; an unknown name is an error that says which are known."""
        values = dict(values)
        try:
            model = ModelConfig.from_dict(_table(values.pop("model", {}), "model"))
        except ModelError as error:
            raise InputError("recipe", f"has a bad model table: {error}") from None
        optimizer = _table(values.pop("optimizer", {}), "optimizer")
        _reject_unknown(OptimizerRecipe, optimizer, "optimizer.")
        _reject_unknown(cls, values, "")
        if isinstance(values.get("samples"), list):
            values["samples"] = tuple(values["samples"])
        return cls(model=model, optimizer=OptimizerRecipe(**optimizer), **values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise InputError(name, f"must be a whole number of at least {lowest}, got {value!r}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(name, f"must be one of {', '.join(allowed)}, got {value!r}")


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(name, f"must be a table of values, got {value!r}")
    return dict(value)


def _reject_unknown(cls: type, values: dict[str, Any], prefix: str) -> None:
    known = [entry.name for entry in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(prefix + unknown[0], f"is not known; allowed are {', '.join(known)}")


def preset_names() -> list[str]:
    """The presets that `story train --preset` knows."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(
    preset: str | None = None, config: Path | None = None, overrides: list[str] | None = None
) -> Recipe:
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
        values = tomllib.loads(config.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("config", f"{config} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError("config", f"{config} is not valid TOML: {error}") from None
    values.setdefault("name", config.stem)
    return Recipe.from_dict(overridden(values, overrides or []))


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
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *tables, last = name.strip().split(".")
        target = values
        for table in tables:
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise InputError(name, "is not a table in this recipe")
        target[last] = value
    return values
