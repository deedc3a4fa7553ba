"""The figures of written stories, checked on stories short enough to count by hand."""

from __future__ import annotations

import pytest

from experiments.written import PROMPTS, WrittenStory, figures, names_in, write_stories
from model.load import load_engine

PROMPT = "Lily and Tom went to the park."


def story(text: str, *, prompt: str = PROMPT, ended: bool = True) -> WrittenStory:
    return WrittenStory(prompt, text, len(text.split()), ended)


def test_each_prompt_names_two_children() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 64
    assert all(len(names_in(prompt)) == 2 for prompt in PROMPTS)


def test_shares_of_ended_and_of_kept_names_are_means_over_stories() -> None:
    got = figures([story("Lily saw Tom."), story("Lily ran home.", ended=False)])
    assert (got.stories, got.ended, got.names_kept, got.names_straight) == (2, 0.5, 0.5, 0.5)
    assert got.mean_tokens == 3


@pytest.mark.parametrize(
    ("text", "confused"),
    [
        ('Tom said, "Come, Tom!" Lily ran.', 1.0),
        ('Tom asked: "Where is Tom?" Lily did not know.', 1.0),
        ('Tom said, "Come, Lily!" They ran.', 0.0),
        ('Tom said, "Come!" Then Lily said, "Tom, wait!"', 0.0),
        ('"I am Tom," said Tom to Lily.', 0.0),
    ],
)
def test_only_who_speaks_to_himself_by_name_is_confused(text: str, confused: float) -> None:
    assert figures([story(text)]).names_confused == confused


def test_repeats_are_counted_in_runs_of_four_words() -> None:
    # Runs of "a b c d a b c d": abcd bcda cdab dabc abcd - one of five has stood before.
    got = figures([story("a b c d a b c d")])
    assert got.repeated_4 == pytest.approx(1 / 5)
    assert got.distinct_2 == pytest.approx(4 / 7)
    assert got.looping == 0


def test_a_story_that_goes_round_is_looping() -> None:
    assert figures([story("the cat sat down " * 20)]).looping == 1


def test_a_story_of_no_words_counts_as_without_repeats() -> None:
    got = figures([story("")])
    assert (got.distinct_2, got.repeated_4, got.names_kept) == (1, 0, 0)


def test_the_same_seed_writes_the_same_stories() -> None:
    with load_engine(slots=4) as engine:
        first = write_stories(engine, seed=3, prompts=PROMPTS[:5])
        alone = [write_stories(engine, seed=3 + number, prompts=[PROMPTS[number]])[0] for number in range(5)]
    assert first == alone
    assert all(story.text for story in first)
