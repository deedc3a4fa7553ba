"""What battles say about the contestants: a win rate that is valid at every look, or Bradley–Terry strengths.

**Two contestants.** The win rate is the share of battles won, a draw being half a win. Its interval is the sequential
one of `story ab`: every other battle says whether the one was preferred, those between say whether the other was, and
win rate minus 1/2 is half of the difference between these two shares. Battles are independent, so the two streams are,
and the interval holds at all looks together, with draws and without. Without draws it is as narrow as if every battle
had been asked both questions.

**More than two.** A battle is won by i over j with probability 1 / (1 + exp(-(s_i - s_j + c * length difference)))
(Bradley and Terry 1952; the covariate as in Chiang et al., "Chatbot Arena", 2024, and its later control of style). A
draw is half a win of each. The intervals are Wald's, from the sandwich covariance, which holds where draws make the
model only roughly true (White 1982; Chiang et al., section 4). Battles of a contestant with itself measure what the
side is worth, and are nobody's wins.

Shapes: B battles, K contestants, P parameters: K strengths, one each for length and side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from experiments.ab.events import Choice
from experiments.ab.sequential import compare
from experiments.common.statistics import CONFIDENCE, Estimate, wilson

POINTS: dict[Choice, float] = {"first": 1.0, "second": 0.0, "alike": 0.5, "both bad": 0.5}
"""Of the first contestant."""
DECIDED = ("first", "second")
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
    outcome: Choice
    first_words: int
    second_words: int


@dataclass(frozen=True, slots=True)
class Score:
    """Of one contestant."""

    name: str
    battles: int
    """Against others."""
    win_rate: Estimate
    """The chance to be preferred: to the other of two, or, of more, to an average other one as `equal_length` is."""
    equal_length: Estimate
    """The same by Bradley and Terry's model, between stories of the same length and without a bias to a side."""
    words: float
    """Of its stories, on average."""

    @property
    def meaningful(self) -> bool:
        return self.battles >= ENOUGH


@dataclass(frozen=True, slots=True)
class Scores:
    """All contestants, sorted by the lower bound."""

    contestants: tuple[Score, ...]
    battles: int
    """Between different contestants."""
    side: Estimate
    """The chance that the first is preferred among equals: 0.5 without a bias."""
    itself: Estimate | None
    """How often the first was preferred, of the battles of a contestant with itself that were decided."""
    length: float
    """What twice the words add to the log-odds of being preferred."""


def score(battles: Sequence[Battle], *, level: float = CONFIDENCE) -> Scores:
    """Score the contestants by their battles in the order of arrival. Raises `ValueError` where there is no battle."""
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

    fought = [battle for battle in battles if battle.first != battle.second]
    found = []
    for number, name in enumerate(names):
        contrast_P = np.zeros(len(fitted_P))
        if len(names) > 1:
            contrast_P[: len(names)] -= 1 / (len(names) - 1)
            contrast_P[number] = 1
        own = [battle for battle in fought if name in (battle.first, battle.second)]
        fitted = chance(contrast_P, len(own))
        rate = win_rate(own, name, level=level) if len(names) == 2 and own else fitted
        words = [battle.first_words for battle in battles if battle.first == name]
        words += [battle.second_words for battle in battles if battle.second == name]
        found.append(Score(name, len(own), rate, fitted, sum(words) / len(words)))
    side_P = np.zeros(len(fitted_P))
    side_P[-1] = 1
    ranked = sorted(found, key=lambda each: (-each.win_rate.low, -each.win_rate.value, each.name))
    itself = [each.outcome == "first" for each in battles if each.first == each.second and each.outcome in DECIDED]
    return Scores(
        contestants=tuple(ranked),
        battles=len(fought),
        side=chance(side_P, len(battles)),
        itself=wilson(sum(itself), len(itself), level=level) if itself else None,
        length=float(fitted_P[-2]),
    )


def notes(scores: Scores, left_out: Mapping[str, int]) -> list[str]:
    """Explain how to read the scores; `left_out`: votes that were not counted, by the reason."""
    two = len(scores.contestants) == 2
    interval = (
        "holds at all looks together"
        if two
        else "is that of the model of Bradley and Terry, against an average other contestant"
    )
    lines = [
        f"A draw is half a win. The interval of the win rate {interval}, with {100 * CONFIDENCE:g} %; "
        "sorted by its lower end.",
        f"The odds of a story twice as long as the other are multiplied by {math.exp(scores.length):.2f}.",
    ]
    if scores.itself is not None:
        rate = percent(scores.itself)
        lines.append(f"Of {scores.itself.n} decided battles of a contestant with itself, the left story won {rate}.")
    return lines + [f"Not counted, {reason}: {count}." for reason, count in left_out.items()]


def percent(found: Estimate) -> str:
    """`61.3 % (52 to 70)`."""
    return f"{100 * found.value:.1f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


def win_rate(battles: Sequence[Battle], name: str, *, level: float = CONFIDENCE) -> Estimate:
    """The share of battles that `name` wins against the only other contestant, with its interval at all looks."""
    one = min(battles[0].first, battles[0].second)  # so that the other's interval is the mirror image of this one's
    points = [POINTS[each.outcome] if each.first == one else 1 - POINTS[each.outcome] for each in battles]
    won, lost = [value == 1 for value in points[0::2]], [value == 0 for value in points[1::2]]
    found = compare(lost, won, alpha=1 - level)
    value = sum(points) / len(points)
    # The other battles ask the other question, so the share of all may lie just outside.
    low, high = min(0.5 + found.difference_low / 2, value), max(0.5 + found.difference_high / 2, value)
    if name != one:
        value, low, high = 1 - value, 1 - high, 1 - low
    return Estimate(value, low, high, len(points))


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
