"""Scores of the arena: against an optimiser that knows nothing of Newton, and against votes that were simulated."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from experiments.ab.events import Choice
from experiments.arena.score import POINTS, PRIOR, Battle, score, win_rate

STRENGTHS = {"good": 0.9, "fair": 0.0, "poor": -0.9}


def simulated(count: int, *, seed: int, side: float = 0.0, length: float = 0.0) -> list[Battle]:
    rng = np.random.default_rng(seed)
    battles = []
    for _ in range(count):
        first, second = rng.choice(list(STRENGTHS), 2, replace=False)
        words = [int(each) for each in rng.integers(60, 300, 2)]
        edge = STRENGTHS[first] - STRENGTHS[second] + side + length * math.log2((1 + words[0]) / (1 + words[1]))
        outcome: Choice = "alike" if rng.random() < 0.2 else "second"
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
        others = [best[number] for number, name in enumerate(names) if name != each.name]
        edge = best[names.index(each.name)] - np.mean(others)
        assert each.win_rate == each.equal_length
        assert math.isclose(each.win_rate.value, 1 / (1 + math.exp(-edge)), abs_tol=1e-4)


def test_intervals_hold_the_truth_and_the_order_is_right() -> None:
    inside = 0
    for seed in range(40):
        found = score(simulated(400, seed=seed))
        assert [each.name for each in found.contestants] == ["good", "fair", "poor"]
        inside += found.contestants[1].win_rate.low <= 0.5 <= found.contestants[1].win_rate.high
    assert inside >= 34  # 95 % of 40 are 38; fewer than 34 come in one of 2,000 times


def against(count: int, *, seed: int, won: float, draws: float) -> list[Battle]:
    """Battles of a and b, sides at random, of which a wins `won` of those that are not drawn."""
    rng = np.random.default_rng(seed)
    battles = []
    for _ in range(count):
        left, right = rng.permutation(["a", "b"])
        outcome: Choice = "both bad"
        if rng.random() >= draws:
            outcome = "first" if (left == "a") == (rng.random() < won) else "second"
        battles.append(Battle(str(left), str(right), outcome, 9, 9))
    return battles


def test_between_two_the_interval_holds_the_truth_at_all_looks_together() -> None:
    missed = 0
    for seed in range(60):
        battles = against(240, seed=seed, won=0.6, draws=0.25)
        truth = 0.75 * 0.6 + 0.25 / 2
        looks = [win_rate(battles[:count], "a") for count in range(20, 241, 20)]
        missed += any(look.excludes(truth) for look in looks)
    assert missed <= 6  # 5 % of 60 are 3; more than 6 come in one of 30 times where the promise is met exactly


def test_between_two_the_rate_is_the_share_of_battles_won_and_one_s_loss_is_the_other_s_win() -> None:
    battles = against(120, seed=3, won=0.85, draws=0.2)
    found = score(battles)
    first, second = found.contestants
    assert [first.name, second.name] == ["a", "b"]
    wins = sum((each.first if each.outcome == "first" else each.second) == "a" for each in battles)
    wins -= sum(each.outcome == "both bad" and each.second == "a" for each in battles)
    draws = sum(each.outcome == "both bad" for each in battles)
    assert first.win_rate.value == pytest.approx((wins + draws / 2) / 120)
    assert first.win_rate.low > 0.5 > second.win_rate.high
    mirrored = [1 - second.win_rate.high, 1 - second.win_rate.low, 1 - second.win_rate.value]
    assert [first.win_rate.low, first.win_rate.high, first.win_rate.value] == pytest.approx(mirrored)
    assert first.equal_length.value == pytest.approx(first.win_rate.value, abs=0.05)


def test_a_bias_to_one_side_shows_in_battles_of_equals() -> None:
    battles = [Battle("a", "a", "first", 9, 9)] * 60 + [Battle("a", "a", "second", 9, 9)] * 20
    found = score(battles)
    assert found.side.low > 0.5
    assert found.contestants[0].win_rate.value == pytest.approx(0.5)
    assert (found.battles, found.contestants[0].battles, found.contestants[0].meaningful) == (0, 0, False)


def test_battles_with_itself_are_nobody_s_wins() -> None:
    battles = against(60, seed=1, won=0.7, draws=0.1)
    alone = score(battles)
    beside = score([*battles, *[Battle("a", "a", "first", 9, 9)] * 40])
    rates = [{each.name: (each.win_rate, each.battles) for each in found.contestants} for found in (alone, beside)]
    assert rates[0] == rates[1]
    assert beside.side.value > alone.side.value


def test_few_battles_mean_nothing_yet_and_none_is_an_error() -> None:
    found = score([Battle("a", "b", "first", 9, 9)] * 3)
    assert not any(each.meaningful for each in found.contestants)
    assert found.contestants[0].win_rate.low < 0.5
    assert 0 < found.contestants[0].equal_length.low < found.contestants[0].equal_length.value < 1
    with pytest.raises(ValueError, match="no battle"):
        score([])
