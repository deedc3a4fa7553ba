"""The figures of written stories, checked on stories short enough to count by hand."""

from __future__ import annotations

import pytest

from experiments.quality.generated import Prompt, WrittenStory
from experiments.quality.memorised import longest_copies
from experiments.quality.written import FIGURES, Written, story_figures
from tests.experiments.quality.reports import written

PROMPT = Prompt("Lily and Tom went to the park.", ("Lily", "Tom"))


def story(text: str, *, number: int = 0, seed: int = 0, ended: bool = True) -> WrittenStory:
    return WrittenStory(PROMPT, number, seed, text, 2 * len(text.split()), ended)


def test_shares_of_ended_and_of_kept_names_are_means_over_stories() -> None:
    stories = [story("Lily saw Tom."), story("Lily ran home.", number=1, ended=False)]
    means = {name: estimate.mean for name, estimate in Written.measure(stories).estimates().items()}
    assert (means["ended"], means["names_kept"], means["names_straight"]) == (0.5, 0.5, 0.5)
    assert (means["mean_tokens"], means["mean_words"]) == (6, 3)


def test_a_name_that_is_kept_and_confused_is_not_straight() -> None:
    figures = story_figures(story('Tom said, "Come, Tom!" Lily ran.'))
    assert (figures.names_kept, figures.names_confused, figures.names_straight) == (1, 1, 0)


def test_a_story_that_goes_round_is_looping() -> None:
    assert story_figures(story("the cat sat down " * 20)).looping == 1
    assert story_figures(story("the cat sat down and slept")).looping == 0


def test_a_story_of_no_words_has_no_shares_and_counts_for_the_rest() -> None:
    figures = story_figures(story(""))
    assert (figures.distinct_2, figures.repeated_4, figures.looping, figures.names_kept) == (None, None, 0, 0)
    estimates = Written.measure([story(""), story("Lily and Tom.", number=1)]).estimates()
    assert (estimates["distinct_2"].n, estimates["ended"].n) == (1, 2)
    assert "repeated_4" not in estimates, "no story is four words long"


def test_copies_are_measured_only_where_training_stories_were_given() -> None:
    stories = [story("the fox ran to the red barn and slept")]
    assert Written.measure(stories).longest_copy is None
    assert "copied_words" not in Written.measure(stories).estimates()
    copies = longest_copies([one.text for one in stories], ["A dog ran to the red barn and sang."])
    measured = Written.measure(stories, copies)
    assert measured.estimates()["copied_words"].mean == 6
    assert measured.estimates()["copied_share"].mean == pytest.approx(6 / 9)
    assert measured.longest_copy == copies[0]


def test_every_story_is_a_row_with_its_text_and_figures() -> None:
    rows = written().rows()
    assert [(row["number"], row["seed"]) for row in rows] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert rows[0]["text"] == " Lily saw Tom and the big dog ran to the red door."
    assert (rows[0]["names"], rows[0]["tokens"], rows[0]["words"]) == ("Lily, Tom", 10, 12)
    assert rows[0]["copied_text"] == "the big dog ran to the red"
    assert (rows[1]["names_kept"], rows[1]["copied_words"], rows[1]["copied_text"]) == (0, 0, "")
    expected = {name.removeprefix("mean_") for name in FIGURES}
    assert expected <= rows[0].keys()


def test_the_json_has_means_at_the_top_and_intervals_beside() -> None:
    told = written(3).as_dict()
    assert (told["stories"], told["seeds"]) == (6, [0, 1, 2])
    assert told["names_kept"] == 0.5
    assert told["ended"] == pytest.approx(1 / 3)
    assert told["copied_words_max"] == 7
    for name, (low, high) in told["intervals"].items():
        assert low <= told[name] <= high
