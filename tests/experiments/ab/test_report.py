"""From events to a verdict: who counts, for what, and when it decides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

import pytest
import scipy.stats
from rich.console import Console

from experiments.ab.database import connect, migrate, store
from experiments.ab.events import Event, Exposure, Rating
from experiments.ab.read import gather, known_tests
from experiments.ab.report import Report, make_report
from experiments.ab.shown import markdown, print_report
from model.errors import InputError
from tests.experiments.ab.events import ending, exposure, readers


def report(events: Iterable[Event], *, metric: str = "like", since: float | None = None) -> Report:
    """Stored and read back."""
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    store(engine, list(events))
    with engine.connect() as connection:
        evidence = gather(connection, "t", since=since)
    return make_report(evidence, metric=metric)  # type: ignore[arg-type]


def like(story: str, rating: int = 1) -> Rating:
    return Rating(story=story, rating=rating)


def test_a_clear_difference_decides_for_the_better_arm() -> None:
    found = report(readers(600, {"champion": 0.4, "challenger": 0.75}))
    assert (found.verdict, found.exit_code) == ("better", 0)
    assert found.why == "challenger is better than champion"
    (against,) = [each for each in found.comparisons if each.metric == "like"]
    assert 0 < against.comparison.low < 0.35 < against.comparison.high
    assert not found.ratio.mismatch


def test_a_clear_difference_decides_against_the_worse_arm() -> None:
    found = report(readers(600, {"champion": 0.75, "challenger": 0.4}))
    assert (found.verdict, found.exit_code) == ("worse", 1)


def test_no_difference_stays_undecided() -> None:
    found = report(readers(300, {"champion": 0.5, "challenger": 0.5}, seed=1))
    assert (found.verdict, found.exit_code) == ("undecided", 3)
    assert "visitors of the smaller arm are not enough to tell yet" in found.why


def test_where_less_is_better_less_decides() -> None:
    events: list[Event] = []
    for number in range(200):
        arm = "champion" if number % 2 else "challenger"
        events.append(exposure(f"s{number}", arm, visitor=f"v{number}"))
        events.append(ending(f"s{number}", "stopped" if arm == "champion" else "finished"))
    found = report(events, metric="stopped")
    assert found.verdict == "better"
    assert {each.metric: each.verdict for each in found.comparisons}["finished"] == "better"


def test_arms_that_did_not_get_their_readers_decide_nothing() -> None:
    promised = "champion:1,challenger:3"
    events = [
        dataclasses.replace(event, split=promised) if isinstance(event, Exposure) else event
        for event in readers(600, {"champion": 0.2, "challenger": 0.9})
    ]
    found = report(events)
    assert found.ratio.mismatch
    assert (found.verdict, found.exit_code) == ("undecided", 3)
    assert "did not get the readers that the split promised" in found.why


def test_a_visitor_counts_once_with_the_first_story_and_the_first_verdict() -> None:
    found = report([
        exposure("a"), ending("a", "stopped"), exposure("b"), like("b", -1), like("b"), ending("b"), like("a"),
        exposure("c", visitor="rose"), ending("c", "length"), like("c", 0), ending("c", "finished"),
    ])  # fmt: skip
    arm = found.evidence.arms["champion"]
    assert (arm.visitors, arm.stories, arm.endings) == (2, 3, {"stopped": 1, "finished": 1, "length": 1})
    assert (arm.likes, arm.dislikes) == (2, 0), "stories count by their last verdict"
    assert arm.streams["like"].values == [False]
    assert arm.streams["stopped"].values == [True, False]
    assert arm.streams["finished"].values == [False, False], "going on with a story is no second ending"


def test_what_says_nothing_of_the_model_is_no_observation() -> None:
    found = report([
        exposure("a"), ending("a", "refused"), exposure("b", visitor="rose"), ending("b", "cut"),
        exposure("c", visitor="tim"), ending("c", "failed"),
    ])  # fmt: skip
    arm = found.evidence.arms["champion"]
    assert arm.visitors == 3, "they were dealt all the same"
    assert arm.streams["failed"].values == [True]


def test_a_visitor_who_was_moved_stays_with_the_arm_she_met_first() -> None:
    found = report([
        exposure("a"), ending("a"), exposure("b", "challenger"), ending("b"), like("b"),
    ])  # fmt: skip
    assert found.evidence.arms["challenger"].visitors == 0
    assert found.evidence.arms["challenger"].streams["like"].values == []
    assert found.evidence.arms["challenger"].likes == 1


def test_an_arms_earlier_artifact_is_left_out_and_told() -> None:
    found = report([
        exposure("a", "challenger", digest="old"), ending("a", "failed"),
        exposure("b", "challenger"), ending("b"), exposure("c", visitor="rose"), ending("c"),
    ])  # fmt: skip
    arm = found.evidence.arms["challenger"]
    assert (arm.digest, arm.stories, arm.endings) == ("d" * 64, 1, {"finished": 1})
    assert found.evidence.left_out == {"challenger": 1}
    assert "1 stories of challenger are left out" in markdown(found)


def test_since_takes_only_what_came_then() -> None:
    events: list[Event] = [
        exposure("a", at=100.0),
        ending("a"),
        exposure("b", visitor="rose", at=200.0),
        ending("b"),
    ]
    assert report(events, since=150.0).evidence.arms["champion"].stories == 1
    with pytest.raises(InputError, match="since leaves no story of the test 't'"):
        report([], since=300.0)


def test_an_unknown_test_is_told_with_those_that_there_are() -> None:
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    store(engine, [exposure("a", test="spring"), exposure("b", test="summer"), exposure("c", test="summer")])
    with engine.connect() as connection:
        assert known_tests(connection) == {"summer": 2, "spring": 1}
        with pytest.raises(
            InputError, match=r"test 'autumn' has no stories; there is summer \(2 stories\), spring"
        ):
            gather(connection, "autumn")


def test_with_one_arm_there_is_nothing_to_compare_but_rates_are_told() -> None:
    found = report([exposure("a", "default", split="default:1"), ending("a"), like("a")])
    assert (found.verdict, found.comparisons) == ("undecided", [])
    assert found.why == "only default has told stories: there is nothing to compare it with"


def test_several_challengers_share_the_chance_of_an_error() -> None:
    events = [
        exposure("a", split="champion:1,challenger:1,third:1"),
        exposure("b", "challenger", visitor="rose", split="champion:1,challenger:1,third:1"),
    ]
    found = report(events)
    assert {each.arm for each in found.comparisons} == {"challenger", "third"}
    assert found.evidence.arms["third"].digest == ""


def test_a_rates_interval_is_wilsons() -> None:
    found = report(readers(60, {"champion": 0.5, "challenger": 0.5}))
    values = found.evidence.arms["champion"].streams["like"].values
    rate = found.rates["champion"]["like"]
    assert rate is not None
    expected = scipy.stats.binomtest(sum(values), len(values)).proportion_ci(method="wilson")
    assert [rate.low, rate.high] == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_it_reads_well_and_names_no_visitor(capsys: pytest.CaptureFixture[str]) -> None:
    found = report([*readers(40, {"champion": 0.5, "challenger": 0.5}), exposure("x", digest="old")])
    print_report(found, Console(width=200))
    printed = capsys.readouterr().out
    text = markdown(found)
    plain = json.dumps(found.as_dict())
    assert json.loads(plain)["arms"][1]["arm"] == "challenger"
    for shown in (printed, text):
        assert "UNDECIDED" in shown
        assert "Shares of visitors are as promised: chi-square" in shown
        assert "like (higher is better)" in shown
        assert "stopped (lower is better)" in shown
    visitor = exposure("x").visitor
    assert all(visitor not in shown and "lily" not in shown for shown in (printed, text, plain))
