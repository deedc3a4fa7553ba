"""Assignment of users: weights as given, the same variant for the same user, no user moved without need."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ab.assignment import (
    ALLOWED,
    MAX_VARIANTS,
    MAX_WEIGHT,
    TrafficSplit,
    Variant,
    parse_split,
    without_test,
)
from model.errors import InputError

names = st.from_regex(r"\A[A-Za-z0-9._~/@+-]{1,20}\Z")
weights = st.lists(
    st.tuples(names, st.integers(0, MAX_WEIGHT)), min_size=1, max_size=MAX_VARIANTS, unique_by=lambda pair: pair[0]
).filter(lambda pairs: any(weight for _, weight in pairs))
USERS = [f"user-{number}" for number in range(4000)]


def split(text: str, name: str = "t") -> TrafficSplit:
    return parse_split(text, name)


@given(pairs=weights, spaces=st.sampled_from(["", " "]))
def test_what_is_written_is_read(pairs: list[tuple[str, int]], spaces: str) -> None:
    text = f"{spaces},{spaces}".join(f"{variant}:{weight}" for variant, weight in pairs)
    read = split(text)
    assert read.variants == tuple(Variant(variant, weight) for variant, weight in pairs)
    assert split(str(read)) == read
    assert math.isclose(sum(read.shares().values()), 1)


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
        ("", "'' is not a variant with a weight"),
        ("champion", "'champion' is not a variant with a weight"),
        ("champion:", "'champion:' is not a variant with a weight"),
        ("champion:90,", "'' is not a variant with a weight"),
        ("champion:ninety", "a weight is a whole number from 0 to 1000000, got 'ninety'"),
        ("champion:-1", "got '-1'"),
        ("champion:0.5", "got '0.5'"),
        ("champion:٣", "a weight is a whole number"),
        ("champion:1000001", "got '1000001'"),
        ("champ ion:1", "a variant's name holds letters, digits and ._~/@+- only, got 'champ ion'"),
        ("a:1,b:1,a:2", "a is given twice"),
        ("a:0,b:0", "no variant has a weight above 0"),
        (",".join(f"a{number}:1" for number in range(9)), "at most 8 of them; got 9"),
    ],
)
def test_a_wrong_split_is_one_line(text: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        split(text)
    assert why in str(caught.value)


@given(pairs=weights, user=st.text(max_size=40), name=st.text(max_size=10))
def test_the_order_of_variants_moves_nobody(pairs: list[tuple[str, int]], user: str, name: str) -> None:
    one = TrafficSplit(name, tuple(Variant(variant, weight) for variant, weight in pairs))
    other = TrafficSplit(name, tuple(Variant(variant, weight) for variant, weight in reversed(pairs)))
    assert one.assign(user) == other.assign(user)
    assert dict(pairs)[one.assign(user)] > 0


@given(pairs=weights, user=st.text(max_size=40), which=st.integers(0, 7), more=st.integers(1, 1000))
def test_a_raised_weight_moves_users_into_that_variant_only(
    pairs: list[tuple[str, int]], user: str, which: int, more: int
) -> None:
    before = TrafficSplit("t", tuple(Variant(variant, weight) for variant, weight in pairs))
    raised = pairs[which % len(pairs)][0]
    after = TrafficSplit("t", tuple(Variant(variant, n + more if variant == raised else n) for variant, n in pairs))
    if after.assign(user) != before.assign(user):
        assert after.assign(user) == raised


@given(pairs=weights.filter(lambda pairs: sum(n > 0 for _, n in pairs) > 1), user=st.text(max_size=40))
def test_a_removed_variant_moves_its_own_users_only(pairs: list[tuple[str, int]], user: str) -> None:
    gone = next(variant for variant, weight in pairs if weight)
    before = TrafficSplit("t", tuple(Variant(variant, weight) for variant, weight in pairs))
    after = TrafficSplit("t", tuple(Variant(variant, weight) for variant, weight in pairs if variant != gone))
    if before.assign(user) != gone:
        assert after.assign(user) == before.assign(user)


@pytest.mark.parametrize("text", ["champion:90,challenger:10", "a:1,b:1,c:2", "a:99,b:1", "a:0,b:5"])
def test_variants_get_the_shares_that_were_asked_for(text: str) -> None:
    asked = split(text)
    got = [asked.assign(user) for user in USERS]
    for variant, chance in asked.shares().items():
        doubt = 4 * math.sqrt(chance * (1 - chance) / len(USERS))
        assert abs(got.count(variant) / len(USERS) - chance) <= doubt


def test_going_from_ten_to_twenty_percent_moves_just_the_ten() -> None:
    few, more = split("champion:90,challenger:10"), split("champion:80,challenger:20")
    moved = [user for user in USERS if few.assign(user) != more.assign(user)]
    assert {more.assign(user) for user in moved} == {"challenger"}
    assert 0.08 < len(moved) / len(USERS) < 0.12


def test_another_test_assigns_independently() -> None:
    one, other = split("a:1,b:1", "spring"), split("a:1,b:1", "summer")
    alike = sum(one.assign(user) == other.assign(user) for user in USERS)
    assert 0.45 < alike / len(USERS) < 0.55


def test_another_process_and_a_later_version_assign_the_same(repository: Path) -> None:
    program = (
        "from experiments.ab.assignment import parse_split\n"
        "split = parse_split('champion:90,challenger:10', 't')\n"
        "print(','.join(split.assign(f'user-{number}') for number in range(200)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    mine = split("champion:90,challenger:10")
    assert run.stdout.strip().split(",") == [mine.assign(user) for user in USERS[:200]]
    # And pinned: later versions of this program must assign the same.
    assert [number for number in range(60) if mine.assign(f"user-{number}") == "challenger"] == PINNED


PINNED = [4, 8, 20, 22, 25, 30, 40, 43, 50, 51]


def test_without_a_test_everyone_gets_the_default_model() -> None:
    assert {without_test("t").assign(user) for user in USERS[:50]} == {"default"}
