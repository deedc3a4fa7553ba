"""`STORY_ARENA`: what it names, what it may not, and who fights where it is not set."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.ab.assignment import parse_split, without_test
from experiments.arena.contestants import Contestant, contestants_of, parse_contestants
from model.errors import InputError
from model.generation import SamplingParams
from model.wishes import Wishes


def test_models_and_settings_are_read_and_the_rest_is_as_usual() -> None:
    plain, cool, wished = parse_contestants(
        "champion, runs/mine/model?temperature=0.5&top_k=40,champion?words=cat+dog&dialogue=true&ending=sad"
    )
    assert plain.sampling(7) == SamplingParams(seed=7)
    assert cool.model == "runs/mine/model"
    assert cool.sampling(7) == SamplingParams(temperature=0.5, top_k=40, seed=7)
    assert wished.wishes == Wishes(words=("cat", "dog"), dialogue=True, ending="sad")
    assert plain.settings == "temperature=0.85&top_p=0.95&top_k=0&min_p=0&repetition_penalty=1"
    assert [str(each) for each in (plain, cool)] == ["champion", "runs/mine/model?temperature=0.5&top_k=40"]


settings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2).map(lambda value: round(value, 6)),
        "top_p": st.floats(0.01, 1).map(lambda value: round(value, 6)),
        "top_k": st.integers(0, 1000),
        "dialogue": st.booleans(),
        "length": st.sampled_from(["short", "long"]),
        "words": st.lists(st.sampled_from(["cat", "Zoë", "tea"]), min_size=1, max_size=3).map(tuple),
    },
)


@given(settings, settings)
def test_what_is_written_is_read_again(first: dict[str, Any], second: dict[str, Any]) -> None:
    made = Contestant(model="a", **first), Contestant(model="b", **second)
    again = parse_contestants(", ".join(map(str, made)))
    assert again == made
    assert [each.settings for each in again] == [each.settings for each in made]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("champion", "got 1"),
        ("a,b,c,d,e,f,g,h,i", "got 9"),
        ("a, a?temperature=0.85", "two of them are the same"),
        ("a, b?temperature=hot", "of 'b?temperature=hot', temperature must be a valid number"),
        ("a, b?temperature=7", "temperature must be between 0 and 2, got 7"),
        ("a, b?heat=1", "heat is not known"),
        ("a, b?top_k=1&top_k=2", "may be given once"),
        ("a, b?words=one2", "must be single words"),
        ("a,, b", "of '', model must"),
        ("a, b c", "model must match"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(text: str, said: str) -> None:
    with pytest.raises(InputError, match=r"^STORY_ARENA must be 2 to 8 contestants") as caught:
        parse_contestants(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_who_fights_where_nothing_is_set() -> None:
    def names(*given: object) -> list[str]:
        return [str(each) for each in contestants_of(*given)]  # type: ignore[arg-type]

    assert names(None, without_test("t")) == ["default?temperature=0.85", "default?temperature=0.5"]
    assert names(None, parse_split("champion:9,challenger:1,old:0", "t")) == ["champion", "challenger"]
    assert names("off", without_test("t")) == []
    assert names("a, b", without_test("t")) == ["a", "b"]
