"""What a version must reach: `thresholds.yaml`, read and checked, so that no bound is silently ignored.

A mistyped metric or a bound on the wrong side would look like a threshold that passes. So each entry is checked against
the table of metrics below, and an error names the file and the line.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experiments.common.yaml_file import Place, read_yaml
from model.errors import StoryError

THRESHOLDS = Path(__file__).resolve().parents[1] / "thresholds.yaml"
"""The project's own."""

Scope = Literal["benchmark", "quality", "compare"]
BOUNDS = ("at_least", "above", "at_most", "below")


@dataclass(frozen=True, slots=True)
class Metric:
    """What is known of a metric before it is measured."""

    scope: Scope
    unit: str
    higher_is_better: bool
    low: float
    high: float
    """The values that it can have."""


_TABLE: dict[tuple[Scope, str, Literal["lower", "higher"]], str] = {
    ("benchmark", "s", "lower"): "avg_generation_time median_generation_time min_generation_time max_generation_time "
    "p95_generation_time p99_generation_time ttft_p50 ttft_p95 ttft_p99 itl_p50 itl_p95 itl_p99 tpot_p50 tpot_p95 "
    "tpot_p99 cold_start_s",
    ("benchmark", "share", "higher"): "success_rate goodput_share",
    ("benchmark", "share", "lower"): "error_rate",
    ("benchmark", "requests/s", "higher"): "goodput",
    ("benchmark", "streams", "higher"): "concurrent_handling",
    ("benchmark", "tokens/s", "higher"): "tokens_per_second total_tokens_per_second",
    ("benchmark", "percent", "lower"): "memory_percent",
    ("benchmark", "MB", "lower"): "peak_rss_mb",
    ("benchmark", "requests", "higher"): "requests",
    ("quality", "bits/byte", "lower"): "bits_per_byte",
    ("quality", "nats/token", "lower"): "loss",
    ("quality", "share", "higher"): "written/ended written/names_kept written/names_straight written/distinct_1 "
    "written/distinct_2 written/distinct_3 rare_names/kept rare_names/ended "
    "wishes/words wishes/length wishes/dialogue wishes/sad wishes/happy",
    ("quality", "share", "lower"): "written/repeated_4 written/looping written/names_confused written/copied_share "
    "rare_names/mutated",
    ("quality", "words", "lower"): "written/copied_words_max",
    ("compare", "bits/byte", "lower"): "bits_per_byte_difference",
    ("compare", "ratio", "lower"): "generation_time_ratio ttft_ratio itl_ratio",
    ("compare", "share", "higher"): "arena_win_rate",
    ("compare", "ratio", "higher"): "tokens_per_second_ratio total_tokens_per_second_ratio",
}
METRICS = {
    name: Metric(
        scope,
        unit,
        better == "higher",
        -math.inf if name == "bits_per_byte_difference" else 0.0,
        {"share": 1.0, "percent": 100.0}.get(unit, math.inf),
    )
    for (scope, unit, better), names in _TABLE.items()
    for name in names.split()
}
"""Every metric that a threshold may name."""


class ThresholdsError(StoryError):
    """The file of thresholds is unusable; the message names the file and, where there is one, the line."""


class Threshold(BaseModel):
    """One bound on one metric."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    metric: str
    unit: str
    scope: Scope
    reason: str = Field(min_length=1)
    at_least: float | None = Field(default=None, allow_inf_nan=False)
    above: float | None = Field(default=None, allow_inf_nan=False)
    at_most: float | None = Field(default=None, allow_inf_nan=False)
    below: float | None = Field(default=None, allow_inf_nan=False)
    stories: Literal["own", "other"] | None = None
    """Of quality: whether the bound is for our own held-out stories or for all others; None: for any."""
    min_n: int | None = Field(default=None, ge=1)
    """Fewer observations than this are not enough to decide by; None: one figure is enough."""

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        metric = METRICS.get(self.metric)
        if metric is None:
            raise ValueError(f"metric: {self.metric!r} is not measured; known are {', '.join(METRICS)}")
        if self.unit != metric.unit:
            raise ValueError(f"unit: {self.metric} is measured in {metric.unit}, got {self.unit!r}")
        if self.scope != metric.scope:
            raise ValueError(f"scope: {self.metric} belongs to {metric.scope}, got {self.scope}")
        if self.stories is not None and self.scope != "quality":
            raise ValueError(f"stories: belongs to quality, and {self.metric} to {self.scope}")
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if not given:
            raise ValueError(f"metric: {self.metric} needs a bound: one of {', '.join(BOUNDS)}")
        if len(given) > 1:
            raise ValueError(f"{given[1]}: contradicts {given[0]}; a threshold has one bound")
        (name,) = given
        if (name in ("at_least", "above")) != metric.higher_is_better:
            better = "higher" if metric.higher_is_better else "lower"
            raise ValueError(f"{name}: contradicts the metric: of {self.metric} {better} is better")
        if not metric.low <= self.limit <= metric.high:
            possible = f"{metric.low:g} to {metric.high:g}"
            raise ValueError(f"{name}: {self.limit:g} is outside of what {self.metric} can be: {possible}")
        if self.limit == {"above": metric.high, "below": metric.low}.get(name):
            raise ValueError(f"{name}: no {self.metric} can ever be {name} {self.limit:g}")
        return self

    @property
    def bound(self) -> str:
        return next(name for name in BOUNDS if getattr(self, name) is not None)

    @property
    def limit(self) -> float:
        return float(getattr(self, self.bound))

    @property
    def higher_is_better(self) -> bool:
        return self.bound in ("at_least", "above")

    def holds(self, value: float) -> bool:
        """Whether `value` is on the allowed side; NaN never is."""
        if self.bound in ("at_least", "at_most") and value == self.limit:
            return True
        return value > self.limit if self.higher_is_better else value < self.limit

    def margin(self, value: float) -> float:
        """How far `value` is inside the bound, in `unit`; negative: outside."""
        return value - self.limit if self.higher_is_better else self.limit - value

    def as_dict(self) -> dict[str, Any]:
        stated = {"metric": self.metric, "unit": self.unit, "bound": self.bound}
        return stated | {"threshold": self.limit, "reason": self.reason}

    def __str__(self) -> str:
        sign = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}[self.bound]
        unit = "" if self.unit in ("share", "ratio") else f" {self.unit}"
        return f"{sign} {self.limit:g}{unit}"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """All thresholds of a file, in its order."""

    entries: tuple[Threshold, ...]
    digest: str
    """SHA-256 (hex) of the file, as `sha256sum` prints it."""

    def __iter__(self) -> Iterator[Threshold]:
        return iter(self.entries)


def load_thresholds(path: Path = THRESHOLDS) -> Thresholds:
    """Read and check a file of thresholds.

    Raises:
        ThresholdsError: the file cannot be read, is not YAML, or says something that means nothing; the message
            names file and line.
        MissingExtraError: PyYAML is not installed.
    """
    file = read_yaml(path, ThresholdsError, "thresholds")
    value = file.value
    if not (isinstance(value, dict) and set(value) == {"thresholds"} and isinstance(value["thresholds"], list)):
        raise ThresholdsError(f"{file.at(())}: must be one list called 'thresholds'")
    entries: list[Threshold] = []
    first: dict[tuple[str, str], int] = {}
    for number, entry in enumerate(value["thresholds"]):
        place: Place = ("thresholds", number)
        try:
            threshold = Threshold.model_validate(entry)
        except ValidationError as error:
            raise ThresholdsError(file.blame(error, place)) from None
        line = file.line(place)
        for stories in ("own", "other") if threshold.stories is None else (threshold.stories,):
            place_of_first = first.setdefault((threshold.metric, stories), line)
            if place_of_first != line:
                raise ThresholdsError(
                    f"{path}, line {line}: {threshold.metric} already has a bound in line {place_of_first}"
                )
        entries.append(threshold)
    if not entries:
        raise ThresholdsError(f"{file.at(('thresholds',))}: holds no threshold, so everything would pass")
    return Thresholds(tuple(entries), hashlib.sha256(file.content).hexdigest())
