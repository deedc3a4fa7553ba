"""Who reads which version: shares as asked for, the same visitor always alike, nobody moved without need."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ab.split import ALLOWED, MAX_ARMS, MAX_SHARE, Share, Split, everyone, parse_split
from model.errors import InputError

names = st.from_regex(r"\A[A-Za-z0-9._~/@+-]{1,20}\Z")
shares = st.lists(
    st.tuples(names, st.integers(0, MAX_SHARE)), min_size=1, max_size=MAX_ARMS, unique_by=lambda pair: pair[0]
).filter(lambda pairs: any(parts for _, parts in pairs))
VISITORS = [f"visitor-{number}" for number in range(4000)]


def split(text: str, name: str = "t") -> Split:
    return parse_split(text, name)


@given(pairs=shares, spaces=st.sampled_from(["", " "]))
def test_what_is_written_is_read(pairs: list[tuple[str, int]], spaces: str) -> None:
    text = f"{spaces},{spaces}".join(f"{arm}:{parts}" for arm, parts in pairs)
    read = split(text)
    assert read.shares == tuple(Share(arm, parts) for arm, parts in pairs)
    assert split(str(read)) == read
    assert math.isclose(sum(read.chances().values()), 1)


@given(text=st.text(max_size=80))
def test_any_other_text_is_one_line_that_says_what_is_allowed(text: str) -> None:
    said = ""
    try:
        split(text)
    except InputError as error:
        said = f"{error.param}: {error}"
    assert not said or said.startswith(f"STORY_SPLIT: STORY_SPLIT {ALLOWED}")
    assert "\n" not in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not an arm with a share"),
        ("champion", "'champion' is not an arm with a share"),
        ("champion:", "'champion:' is not an arm with a share"),
        ("champion:90,", "'' is not an arm with a share"),
        ("champion:ninety", "a share is a whole number from 0 to 1000000, got 'ninety'"),
        ("champion:-1", "got '-1'"),
        ("champion:0.5", "got '0.5'"),
        ("champion:٣", "a share is a whole number"),
        ("champion:1000001", "got '1000001'"),
        ("champ ion:1", "an arm's name holds letters, digits and ._~/@+- only, got 'champ ion'"),
        ("a:1,b:1,a:2", "a stands there twice"),
        ("a:0,b:0", "no arm has a share above 0"),
        (",".join(f"a{number}:1" for number in range(9)), "at most 8 of them; got 9"),
    ],
)
def test_a_wrong_split_is_told_in_one_line(text: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        split(text)
    assert why in str(caught.value)


@given(pairs=shares, visitor=st.text(max_size=40), name=st.text(max_size=10))
def test_a_visitor_stays_where_she_is_whatever_stands_beside_and_in_whatever_order(
    pairs: list[tuple[str, int]], visitor: str, name: str
) -> None:
    one = Split(name, tuple(Share(arm, parts) for arm, parts in pairs))
    other = Split(name, tuple(Share(arm, parts) for arm, parts in reversed(pairs)))
    assert one.arm_of(visitor) == other.arm_of(visitor)
    assert dict(pairs)[one.arm_of(visitor)] > 0


@given(pairs=shares, visitor=st.text(max_size=40), which=st.integers(0, 7), more=st.integers(1, 1000))
def test_a_raised_share_moves_visitors_into_that_arm_only(
    pairs: list[tuple[str, int]], visitor: str, which: int, more: int
) -> None:
    before = Split("t", tuple(Share(arm, parts) for arm, parts in pairs))
    raised = pairs[which % len(pairs)][0]
    after = Split("t", tuple(Share(arm, n + more if arm == raised else n) for arm, n in pairs))
    if after.arm_of(visitor) != before.arm_of(visitor):
        assert after.arm_of(visitor) == raised


@given(pairs=shares.filter(lambda pairs: sum(n > 0 for _, n in pairs) > 1), visitor=st.text(max_size=40))
def test_an_arm_taken_away_moves_its_own_visitors_only(pairs: list[tuple[str, int]], visitor: str) -> None:
    gone = next(arm for arm, parts in pairs if parts)
    before = Split("t", tuple(Share(arm, parts) for arm, parts in pairs))
    after = Split("t", tuple(Share(arm, parts) for arm, parts in pairs if arm != gone))
    if before.arm_of(visitor) != gone:
        assert after.arm_of(visitor) == before.arm_of(visitor)


@pytest.mark.parametrize("text", ["champion:90,challenger:10", "a:1,b:1,c:2", "a:99,b:1", "a:0,b:5"])
def test_arms_get_the_shares_that_were_asked_for(text: str) -> None:
    asked = split(text)
    got = [asked.arm_of(visitor) for visitor in VISITORS]
    for arm, chance in asked.chances().items():
        doubt = 4 * math.sqrt(chance * (1 - chance) / len(VISITORS))
        assert abs(got.count(arm) / len(VISITORS) - chance) <= doubt


def test_going_from_ten_to_twenty_percent_moves_just_the_ten() -> None:
    few, more = split("champion:90,challenger:10"), split("champion:80,challenger:20")
    moved = [visitor for visitor in VISITORS if few.arm_of(visitor) != more.arm_of(visitor)]
    assert {more.arm_of(visitor) for visitor in moved} == {"challenger"}
    assert 0.08 < len(moved) / len(VISITORS) < 0.12


def test_another_test_deals_anew() -> None:
    one, other = split("a:1,b:1", "spring"), split("a:1,b:1", "summer")
    alike = sum(one.arm_of(visitor) == other.arm_of(visitor) for visitor in VISITORS)
    assert 0.45 < alike / len(VISITORS) < 0.55


def test_another_process_deals_the_same(repository: Path) -> None:
    program = (
        "from experiments.ab.split import parse_split\n"
        "split = parse_split('champion:90,challenger:10', 't')\n"
        "print(','.join(split.arm_of(f'visitor-{number}') for number in range(200)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True
    )
    mine = split("champion:90,challenger:10")
    assert run.stdout.strip().split(",") == [mine.arm_of(visitor) for visitor in VISITORS[:200]]
    # And written down: an arm must stay the same in later versions of this program too.
    assert [number for number in range(60) if mine.arm_of(f"visitor-{number}") == "challenger"] == PINNED


PINNED = [0, 11, 18, 23, 43, 57, 58]


def test_without_a_test_everyone_gets_the_usual_model() -> None:
    assert {everyone("t").arm_of(visitor) for visitor in VISITORS[:50]} == {"default"}
