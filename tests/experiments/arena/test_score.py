"""Scores of the arena: against an optimiser that knows nothing of Newton, and against votes that were simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from experiments.arena.score import POINTS, PRIOR, Battle, Outcome, score

STRENGTHS = {"good": 0.9, "fair": 0.0, "poor": -0.9}


def simulated(count: int, *, seed: int, side: float = 0.0, length: float = 0.0) -> list[Battle]:
    rng = np.random.default_rng(seed)
    battles = []
    for _ in range(count):
        first, second = rng.choice(list(STRENGTHS), 2, replace=False)
        words = [int(each) for each in rng.integers(60, 300, 2)]
        edge = STRENGTHS[first] - STRENGTHS[second] + side + length * math.log2((1 + words[0]) / (1 + words[1]))
        outcome: Outcome = "alike" if rng.random() < 0.2 else "second"
        if outcome != "alike" and rng.random() < 1 / (1 + math.exp(-edge)):
            outcome = "first"
        battles.append(Battle(str(first), str(second), outcome, *words))
    return battles


def test_the_fit_is_the_largest_posterior_an_optimiser_finds() -> None:
    battles = simulated(200, seed=1, side=0.3, length=0.5)
    names = sorted(STRENGTHS)

    def loss(values: np.ndarray) -> float:
        total = PRIOR / 2 * float(values @ values)
        for battle in battles:
            edge = values[names.index(battle.first)] - values[names.index(battle.second)] + values[-1]
            edge += values[-2] * math.log2((1 + battle.first_words) / (1 + battle.second_words))
            total -= POINTS[battle.outcome] * edge - math.log1p(math.exp(edge))
        return total

    best = minimize(loss, np.zeros(len(names) + 2), method="BFGS").x
    found = score(battles)
    assert math.isclose(found.length, best[-2], abs_tol=1e-4)
    assert math.isclose(found.side.value, 1 / (1 + math.exp(-best[-1])), abs_tol=1e-4)
    for each in found.contestants:
        edge = best[names.index(each.name)] - np.mean(best[: len(names)])
        assert math.isclose(each.win_rate.value, 1 / (1 + math.exp(-edge)), abs_tol=1e-4)


def test_intervals_hold_the_truth_and_the_order_is_right() -> None:
    inside = 0
    for seed in range(40):
        found = score(simulated(400, seed=seed))
        assert [each.name for each in found.contestants] == ["good", "fair", "poor"]
        inside += found.contestants[1].win_rate.low <= 0.5 <= found.contestants[1].win_rate.high
    assert inside >= 34  # 95 % of 40 are 38; fewer than 34 come in one of 2,000 times


def test_a_bias_to_one_side_shows_in_battles_of_equals() -> None:
    battles = [Battle("a", "a", "first", 9, 9)] * 60 + [Battle("a", "a", "second", 9, 9)] * 20
    found = score(battles)
    assert found.side.low > 0.5
    assert found.contestants[0].win_rate.value == pytest.approx(0.5)


def test_few_battles_mean_nothing_yet_and_none_is_an_error() -> None:
    found = score([Battle("a", "b", "first", 9, 9)] * 3)
    assert not any(each.meaningful for each in found.contestants)
    assert 0 < found.contestants[0].win_rate.low < found.contestants[0].win_rate.value < 1
    with pytest.raises(ValueError, match="no battle"):
        score([])
