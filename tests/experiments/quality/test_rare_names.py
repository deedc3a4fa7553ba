"""Unusual names: which stories keep them, and which change them into others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.generation import (
    RARE_PROMPTS,
    Prompt,
    WrittenStory,
    edit_distance,
    load_prompts,
    measure_rare_names,
    mutations,
)
from training.data.rename import HELD_OUT

WORDS = st.text("abc", max_size=6)


def story(number: int, seed: int, text: str, *names: str) -> WrittenStory:
    return WrittenStory(Prompt(" and ".join(names) + " went out.", names), number, seed, text, 9, seed == 0)


@pytest.mark.parametrize(
    ("continuation", "found"),
    [
        ("Then Ember saw Emild.", {"Emild"}),
        ("Then she saw Amber.", {"Amber"}),
        ("Emild ran.", set()),  # only at a sentence start: no name by its form
        ("Then Ember and Lily met Mama, and Emma's cat.", {"Emma"}),
        ("Then Ember's mom saw Kofi.", set()),
        ("Then she saw an emu, and Tom.", set()),
    ],
)
def test_a_mutation_is_a_name_near_to_the_prompts(continuation: str, found: set[str]) -> None:
    assert mutations(Prompt("Ember and Kofi went out.", ("Ember", "Kofi")), continuation) == found


def test_a_name_of_the_prompt_itself_and_a_short_one_at_a_distance_are_no_mutations() -> None:
    assert not mutations(Prompt("One day, Ember saw Emma.", ("Ember",)), " Then Emma ran to Emma.")
    assert not mutations(Prompt("Ugo ran.", ("Ugo",)), " Then Leo came.")


@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_shares_are_over_stories() -> None:
    measured = measure_rare_names(
        (
            story(0, 0, "Then Ember slept.", "Ember"),
            story(0, 1, "Then Emild slept.", "Ember"),
            story(1, 0, "Then Zuri saw Kofi.", "Zuri", "Kofi"),
            story(1, 1, "Then Zuri slept.", "Zuri", "Kofi"),
        )
    )
    assert [row["mutated"] for row in measured.rows()] == [0.0, 1.0, 0.0, 0.0]
    output = measured.as_dict()
    assert (output["stories"], output["kept"], output["mutated"], output["ended"]) == (4, 0.5, 0.25, 0.5)
    low, high = output["intervals"]["kept"]
    assert low < 0.5 < high


def test_the_prompts_have_only_held_out_names_one_and_two_each_and_none_twice() -> None:
    prompts = load_prompts(RARE_PROMPTS)
    names = [name for prompt in prompts for name in prompt.names]
    assert len(prompts) >= 60
    assert {len(prompt.names) for prompt in prompts} == {1, 2}
    assert len(set(names)) == len(names)
    assert set(names) <= HELD_OUT
