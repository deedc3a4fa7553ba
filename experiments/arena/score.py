"""What battles say about the contestants: Bradley–Terry strengths with intervals, the length of the stories set aside.

A battle is won by i over j with probability 1 / (1 + exp(-(s_i - s_j + c * length difference))) (Bradley and Terry
1952; the covariate as in Chiang et al., "Chatbot Arena", 2024, and its later control of style). A draw is half a win
of each. The intervals are Wald's, from the sandwich covariance, which holds where draws make the model only roughly
true (White 1982; Chiang et al., section 4).

Shapes: B battles, K contestants, P parameters: K strengths, one each for length and side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.common.statistics import CONFIDENCE, Estimate

Outcome = Literal["first", "second", "alike", "both bad"]
POINTS: dict[Outcome, float] = {"first": 1.0, "second": 0.0, "alike": 0.5, "both bad": 0.5}
"""Of the first contestant."""
PRIOR = 0.1
"""Precision of the normal prior around 0: keeps a contestant that never lost finite. About half a battle."""
ENOUGH = 20
"""Battles of a contestant from which its place means something."""
STEPS = 50
CLOSE = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Battle:
    """One vote: `first` stood on the left, or above."""

    first: str
    second: str
    outcome: Outcome
    first_words: int
    second_words: int


@dataclass(frozen=True, slots=True)
class Score:
    """Of one contestant."""

    name: str
    battles: int
    win_rate: Estimate
    """The chance to be preferred to an average contestant with a story of the same length, sides at random."""

    @property
    def meaningful(self) -> bool:
        return self.battles >= ENOUGH


@dataclass(frozen=True, slots=True)
class Scores:
    """All contestants, sorted by the lower bound."""

    contestants: tuple[Score, ...]
    side: Estimate
    """The chance that the first is preferred among equals: 0.5 without a bias."""
    length: float
    """What twice the words add to the log-odds of being preferred."""


def score(battles: Sequence[Battle], *, level: float = CONFIDENCE) -> Scores:
    """Fit the model. Raises `ValueError` where there is no battle."""
    if not battles:
        raise ValueError("there is no battle to score")
    names = sorted({name for battle in battles for name in (battle.first, battle.second)})
    design_BP = np.zeros((len(battles), len(names) + 2))
    for row_P, battle in zip(design_BP, battles, strict=True):
        row_P[names.index(battle.first)] += 1
        row_P[names.index(battle.second)] -= 1  # a contestant against itself measures the side alone
        row_P[-2] = math.log2((1 + battle.first_words) / (1 + battle.second_words))
        row_P[-1] = 1
    points_B = np.array([POINTS[battle.outcome] for battle in battles])
    fitted_P = _fit(design_BP, points_B)
    covariance_PP = _covariance(design_BP, points_B, fitted_P)
    z = NormalDist().inv_cdf((1 + level) / 2)

    def chance(contrast_P: Floats, n: int) -> Estimate:
        middle = float(contrast_P @ fitted_P)
        spread = z * math.sqrt(float(contrast_P @ covariance_PP @ contrast_P))
        value, low, high = (1 / (1 + math.exp(-place)) for place in (middle, middle - spread, middle + spread))
        return Estimate(value, low, high, n)

    found = []
    for number, name in enumerate(names):
        contrast_P = np.zeros(len(fitted_P))
        contrast_P[: len(names)] -= 1 / len(names)
        contrast_P[number] += 1
        count = sum(name in (battle.first, battle.second) for battle in battles)
        found.append(Score(name, count, chance(contrast_P, count)))
    side_P = np.zeros(len(fitted_P))
    side_P[-1] = 1
    ranked = sorted(found, key=lambda each: (-each.win_rate.low, each.name))
    return Scores(tuple(ranked), chance(side_P, len(battles)), float(fitted_P[-2]))


def _fit(design_BP: Floats, points_B: Floats) -> Floats:
    """The parameters (P,) of the largest posterior, by Newton's method: it is concave."""
    fitted_P = np.zeros(design_BP.shape[1])
    for _ in range(STEPS):
        chance_B = 1 / (1 + np.exp(-design_BP @ fitted_P))
        step_P = np.linalg.solve(
            _curvature(design_BP, chance_B), design_BP.T @ (points_B - chance_B) - PRIOR * fitted_P
        )
        fitted_P += step_P
        if np.abs(step_P).max() < CLOSE:
            break
    return fitted_P


def _curvature(design_BP: Floats, chance_B: Floats) -> Floats:
    weighted_BP = design_BP * (chance_B * (1 - chance_B))[:, None]
    return design_BP.T @ weighted_BP + PRIOR * np.eye(design_BP.shape[1])


def _covariance(design_BP: Floats, points_B: Floats, fitted_P: Floats) -> Floats:
    chance_B = 1 / (1 + np.exp(-design_BP @ fitted_P))
    bread_PP = np.linalg.inv(_curvature(design_BP, chance_B))
    scores_BP = design_BP * (points_B - chance_B)[:, None]
    meat_PP = scores_BP.T @ scores_BP + PRIOR * np.eye(len(fitted_P))
    return bread_PP @ meat_PP @ bread_PP
