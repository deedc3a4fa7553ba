"""What all trials of a sweep share, kept with its study: the space, the budget, the data and the seed.

Only trials of one plan can be compared, so a sweep that is continued takes its plan from the study, and one that is
asked for with another plan is refused.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.sweep.space import Space
from model.errors import InputError
from training.trainer.recipe import Recipe

PARTS = 8
"""Looks at a trial: one after each eighth of its budget, which is where trials are compared with each other."""
NEVER = 10**9
"""Steps that no trial makes."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What each trial may use: minutes by the clock, or `steps` of the base recipe.

    A trial with larger batches makes fewer steps than that, so that all see equally many tokens.
    """

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise InputError("budget", "must be given for each trial: --minutes or --steps, not both")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise InputError("minutes", f"must be above 0, got {self.minutes}")
        if self.steps is not None and self.steps < PARTS:
            raise InputError("steps", f"must be at least {PARTS}, one for each look, got {self.steps}")

    def given_to(self, recipe: Recipe, base: Recipe) -> Recipe:
        """The recipe with this budget; it is evaluated `PARTS` times, the last time at its end."""
        if self.steps is None:
            return dataclasses.replace(
                recipe, minutes=self.minutes, steps=NEVER, eval_every=NEVER, patience=0
            )
        tokens = self.steps * base.rows * base.row_tokens
        steps = max(PARTS, round(tokens / (recipe.rows * recipe.row_tokens)))
        return dataclasses.replace(
            recipe, minutes=None, steps=steps, eval_every=math.ceil(steps / PARTS), patience=0
        )

    def __str__(self) -> str:
        return f"{self.minutes:g} minutes" if self.minutes is not None else f"{self.steps} steps"


def part_of(recipe: Recipe, step: int, elapsed: float) -> int:
    """Eighths of a recipe's budget that are used, 0 to 8. `elapsed`: seconds."""
    share = step / recipe.steps
    if recipe.minutes is not None:
        share = max(share, elapsed / (recipe.minutes * 60))
    return min(PARTS, int(share * PARTS))


@dataclass(frozen=True, slots=True)
class Plan:
    """One sweep."""

    space: Space
    budget: Budget
    data: str
    """Folder of token shards; on Modal, its name on the Volume."""
    digest: str | None
    """Of the shards; None: not known before the first trial (they lie on Modal)."""
    place: str
    """Where it computes: trials of unlike machines have unlike budgets in minutes."""
    seed: int = 0
    """Of what is drawn from the space. The trials' own seed is the recipe's, and equal for all."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "space": self.space.as_dict(), "budget": dataclasses.asdict(self.budget), "data": self.data,
            "digest": self.digest, "place": self.place, "seed": self.seed,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The reverse of `as_dict`."""
        return cls(
            Space.from_dict(values["space"]), Budget(**values["budget"]), values["data"], values["digest"],
            values["place"], values["seed"],
        )  # fmt: skip

    def recipe(self, values: dict[str, Any]) -> Recipe:
        """The whole recipe of a trial. Raises `InputError` where its values do not fit together."""
        return self.budget.given_to(self.space.recipe(values), self.space.base)

    def folder(self, out: Path, first: int) -> Path:
        """Where the trial with this number, or the first of its tries, keeps its checkpoints."""
        return out / f"trial-{first:04d}"
