"""From events to a verdict: who counts, for what, and when it decides."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

import pytest
import scipy.stats
from rich.console import Console

from experiments.ab.events import Event, Exposure, Rating
from experiments.ab.report import (
    Metric,
    Report,
    VariantEvidence,
    gather,
    known_tests,
    make_report,
    markdown,
    print_report,
)
from experiments.ab.store import connect, insert_events, migrate
from model.errors import InputError
from tests.experiments.ab.events import ending, exposure, served, users


def report(events: Iterable[Event], *, metric: str = "like", since: float | None = None) -> Report:
    """Stored and read back."""
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    insert_events(engine, list(events))
    with engine.connect() as connection:
        evidence = gather(connection, "t", since=since)
    return make_report(evidence, metric=metric)  # type: ignore[arg-type]


def observed_values(variant: VariantEvidence, metric: Metric) -> list[bool]:
    return [value for value, _ in variant.observed[metric]]


def like(story: str, rating: int = 1) -> Rating:
    return Rating(story=story, rating=rating)


def test_a_clear_difference_decides_for_the_better_variant() -> None:
    found = report(users(600, {"champion": 0.4, "challenger": 0.75}))
    assert (found.verdict, found.exit_code) == ("better", 0)
    assert found.why == "challenger is better than champion"
    (against,) = [each for each in found.comparisons if each.metric == "like"]
    assert 0 < against.difference_low < 0.35 < against.difference_high
    assert not found.ratio.mismatch


def test_a_clear_difference_decides_against_the_worse_variant() -> None:
    found = report(users(600, {"champion": 0.75, "challenger": 0.4}))
    assert (found.verdict, found.exit_code) == ("worse", 1)


def test_no_difference_stays_undecided() -> None:
    found = report(users(300, {"champion": 0.5, "challenger": 0.5}, seed=1))
    assert (found.verdict, found.exit_code) == ("undecided", 3)
    assert "users of the smaller variant are not enough yet" in found.why


def test_where_less_is_better_less_decides() -> None:
    events: list[Event] = []
    for number in range(200):
        variant = "champion" if number % 2 else "challenger"
        events.append(exposure(f"s{number}", variant, user=f"v{number}"))
        events.append(ending(f"s{number}", "stopped" if variant == "champion" else "finished"))
    found = report(events, metric="stopped")
    assert found.verdict == "better"
    assert {each.metric: each.verdict for each in found.comparisons}["finished"] == "better"


def test_a_sample_ratio_mismatch_decides_nothing() -> None:
    promised = "champion:1,challenger:3"
    events = [
        dataclasses.replace(event, split=promised) if isinstance(event, Exposure) else event
        for event in users(600, {"champion": 0.2, "challenger": 0.9})
    ]
    found = report(events)
    assert found.ratio.mismatch
    assert (found.verdict, found.exit_code) == ("undecided", 3)
    assert "did not get the users that the split promised" in found.why


def test_a_user_counts_once_with_the_first_story_and_the_first_rating() -> None:
    stories = [*served("a", "stopped"), *served("b"), *served("c", "length", user="rose"), ending("c")]
    found = report([*stories, like("b", -1), like("b"), like("a"), like("c", 0)])
    variant = found.evidence.variants["champion"]
    assert (variant.users, variant.stories) == (2, 3)
    assert variant.endings == {"stopped": 1, "finished": 1, "length": 1}
    assert (variant.likes, variant.dislikes) == (2, 0), "stories count by their last rating"
    assert observed_values(variant, "like") == [False]
    assert observed_values(variant, "stopped") == [True, False]
    assert observed_values(variant, "finished") == [False, False], "a continuation is no second ending"


def test_refusals_and_shutdowns_are_no_observations() -> None:
    stories = [*served("a", "refused"), *served("b", "aborted", user="rose"), *served("c", "failed", user="tim")]
    found = report(stories)
    variant = found.evidence.variants["champion"]
    assert variant.users == 3, "they were assigned all the same"
    assert observed_values(variant, "failed") == [True]


def test_a_user_who_was_moved_counts_for_the_first_variant() -> None:
    found = report([*served("a"), *served("b", variant="challenger"), like("b")])
    assert found.evidence.variants["challenger"].users == 0
    assert observed_values(found.evidence.variants["challenger"], "like") == []
    assert found.evidence.variants["challenger"].likes == 1


def test_a_variants_earlier_artifact_is_left_out_and_reported() -> None:
    old = served("a", "failed", "challenger", digest="old")
    found = report([*old, *served("b", variant="challenger"), *served("c", user="rose")])
    variant = found.evidence.variants["challenger"]
    assert (variant.digest, variant.stories, variant.endings) == ("d" * 64, 1, {"finished": 1})
    assert found.evidence.left_out == {"challenger": 1}
    assert "1 stories of challenger are left out" in markdown(found)


def test_since_takes_only_what_came_then() -> None:
    events: list[Event] = [exposure("a", at=100.0), ending("a"), exposure("b", user="rose", at=200.0), ending("b")]
    assert report(events, since=150.0).evidence.variants["champion"].stories == 1
    with pytest.raises(InputError, match="since leaves no story of the test 't'"):
        report([], since=300.0)


def test_an_unknown_test_is_answered_with_the_existing_ones() -> None:
    engine = connect("sqlite:///stories.db", writes=True)
    migrate(engine)
    insert_events(engine, [exposure("a", test="spring"), exposure("b", test="summer"), exposure("c", test="summer")])
    with engine.connect() as connection:
        assert known_tests(connection) == {"summer": 2, "spring": 1}
        with pytest.raises(InputError, match=r"test 'autumn' has no stories; there is summer \(2 stories\), spring"):
            gather(connection, "autumn")


def test_one_variant_has_nothing_to_be_compared_with() -> None:
    found = report([exposure("a", "default", split="default:1"), ending("a"), like("a")])
    assert (found.verdict, found.comparisons) == ("undecided", [])
    assert found.why == "only default has served stories: there is nothing to compare it with"


def test_several_challengers_share_the_chance_of_an_error() -> None:
    events = [
        exposure("a", split="champion:1,challenger:1,third:1"),
        exposure("b", "challenger", user="rose", split="champion:1,challenger:1,third:1"),
    ]
    found = report(events)
    assert {each.variant for each in found.comparisons} == {"challenger", "third"}
    assert found.evidence.variants["third"].digest == ""


def test_a_rates_interval_is_wilsons() -> None:
    found = report(users(60, {"champion": 0.5, "challenger": 0.5}))
    values = observed_values(found.evidence.variants["champion"], "like")
    rate = found.evidence.variants["champion"].rate("like")
    assert rate is not None
    expected = scipy.stats.binomtest(sum(values), len(values)).proportion_ci(method="wilson")
    assert [rate.low, rate.high] == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_terminal_markdown_and_json_name_no_user(capsys: pytest.CaptureFixture[str]) -> None:
    found = report([*users(40, {"champion": 0.5, "challenger": 0.5}), exposure("x", digest="old")])
    print_report(found, Console(width=200))
    printed = capsys.readouterr().out
    text = markdown(found)
    plain = json.dumps(found.as_dict())
    assert json.loads(plain)["variants"][1]["variant"] == "challenger"
    for shown in (printed, text):
        assert "UNDECIDED" in shown
        assert "Shares of users are as promised: sequential evidence" in shown
        assert "like (higher is better)" in shown
        assert "stopped (lower is better)" in shown
    user = exposure("x").user_hash
    assert all(user not in shown and "lily" not in shown for shown in (printed, text, plain))
