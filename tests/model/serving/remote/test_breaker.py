"""When a service is given up, and when it is tried again."""

from __future__ import annotations

import pytest

from model.serving.remote.modal import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_only_failures_in_a_row_open_it(clock: Clock) -> None:
    breaker = Breaker(3, 10, clock)
    for _ in range(5):
        breaker.failed("refused")
        breaker.failed("refused")
        assert breaker.closed
        breaker.succeeded()
    for _ in range(3):
        breaker.failed("refused")
    assert (breaker.state, breaker.reason) == ("open", "refused")


def test_a_failure_that_took_a_time_out_opens_it_at_once(clock: Clock) -> None:
    breaker = Breaker(3, 10, clock)
    breaker.failed("no token", slow=True)
    assert breaker.state == "open"


def test_after_the_pause_one_probe_is_let_through_and_its_success_closes_it(clock: Clock) -> None:
    breaker = Breaker(1, 10, clock)
    breaker.failed("refused")
    clock.now += 9.9
    assert not breaker.probe()
    assert breaker.wait == pytest.approx(0.1)
    clock.now += 0.2
    assert breaker.probe()
    assert breaker.state == "half-open"
    assert not breaker.closed
    assert not breaker.probe(), "one at a time"
    breaker.succeeded()
    assert (breaker.state, breaker.reason, breaker.failures) == ("closed", "", 0)
    assert not breaker.probe(), "none is needed"


def test_a_probe_that_fails_starts_the_pause_again(clock: Clock) -> None:
    breaker = Breaker(1, 10, clock)
    breaker.failed("refused")
    clock.now += 10
    assert breaker.probe()
    clock.now += 5  # it took so long to fail
    breaker.probe_failed("still refused")
    assert (breaker.state, breaker.wait, breaker.reason) == ("open", 10, "still refused")


def test_stories_that_fail_while_it_is_open_do_not_put_the_probe_off(clock: Clock) -> None:
    breaker = Breaker(1, 10, clock)
    breaker.failed("cut")
    clock.now += 6
    breaker.failed("another one cut")
    assert breaker.wait == 4


def test_a_story_that_ends_well_while_it_is_open_closes_it_and_a_late_probe_changes_nothing(
    clock: Clock,
) -> None:
    breaker = Breaker(1, 10, clock)
    breaker.failed("cut")
    clock.now += 10
    assert breaker.probe()
    breaker.succeeded()
    breaker.probe_failed("late")
    assert breaker.closed
