"""Stories that depend on prompt and seed alone, and figures checked on stories short enough to count by hand.

Copied runs are compared with a search of every run; training stories come out of files, folders and shards.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.generation import (
    ANCHOR,
    FIGURES,
    OPENING_WORDS,
    Prompt,
    TrainingTexts,
    UnfinishedStoryError,
    Written,
    WrittenStory,
    all_kept,
    distinct,
    generate_stories,
    holds,
    load_prompts,
    longest_copies,
    names_in,
    prompts_digest,
    repeated,
    share_kept,
    speaks_to_himself,
    split_opening,
    story_figures,
    words,
)
from model.errors import DataError
from tests.experiments.quality.reports import written
from tests.model import engines
from training.data.corpus import load_own_stories, story_id
from training.data.prepare import PrepareOptions, prepare


def test_each_prompt_names_two_children() -> None:
    prompts = load_prompts()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 64
    assert all(len(prompt.names) == 2 for prompt in prompts)
    assert all(holds(prompt.text, name) for prompt in prompts for name in prompt.names)


def test_the_prompts_are_those_that_figures_in_the_log_were_measured_on() -> None:
    """Whoever changes a prompt changes this digest too, and thinks of the figures that then compare no more."""
    assert prompts_digest(load_prompts())[:12] == "639cce02356c"


def test_stories_come_by_seed_and_prompt_and_each_as_if_it_were_alone() -> None:
    prompts = load_prompts()[:3]
    heard: list[int] = []
    with engines.engine(slots=2) as engine:
        stories = generate_stories(engine, prompts, [0, 5], heard.append)
        later = generate_stories(engine, prompts, [5])
    assert [(story.seed, story.number) for story in stories] == [(0, 0), (0, 1), (0, 2), (5, 0), (5, 1), (5, 2)]
    assert all(story.prompt == prompts[story.number] for story in stories)
    assert stories[3:] == later
    assert len({story.text for story in stories}) == 6
    assert sum(heard) == 6


def test_a_model_that_fails_gives_no_figures() -> None:
    network = engines.runtime()
    network.fail_next = RuntimeError("out of memory")
    with engines.engine(network) as engine, pytest.raises(UnfinishedStoryError, match="the story of prompt 1 was not"):
        generate_stories(engine, [Prompt("The dog", ())], [0])


def test_words_are_runs_of_letters_in_lower_case() -> None:
    assert words('"Tim\'s dog," said Zoë - 2 times!') == ["tim's", "dog", "said", "zoë", "2", "times"]


def test_repeats_are_counted_in_runs() -> None:
    # Runs of "a b c d a b c d": abcd bcda cdab dabc abcd - one of five has stood before.
    sequence = words("a b c d a b c d")
    assert repeated(sequence, 4) == pytest.approx(1 / 5)
    assert distinct(sequence, 2) == pytest.approx(4 / 7)
    assert distinct(sequence, 1) == 0.5


@given(st.text("abc .'\n\"", max_size=60), st.integers(1, 4))
def test_shares_are_those_of_a_count_of_runs(text: str, size: int) -> None:
    sequence = words(text)
    counts = Counter(tuple(sequence[start : start + size]) for start in range(len(sequence) - size + 1))
    if not counts:
        assert distinct(sequence, size) is None
        assert repeated(sequence, size) is None
        return
    again = sum(count - 1 for count in counts.values())
    assert repeated(sequence, size) == pytest.approx(again / counts.total())
    assert distinct(sequence, size) == pytest.approx(len(counts) / counts.total())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The dog saw Lily and Tom.", {"Lily", "Tom"}),
        ('She ran. Then he said, "Come!"', set()),
        ("They met, Max and I, and I'm OK.", {"Max"}),
        ("He asked Mr. Bear and Dr Fox.", {"Fox"}),
    ],
)
def test_a_name_is_a_capital_in_mid_sentence(text: str, names: set[str]) -> None:
    assert names_in(text) == names


def test_a_name_is_a_word_of_its_own() -> None:
    assert holds("It was Tim's ball.", "Tim")
    assert not holds("Timmy ran.", "Tim")
    assert all_kept("Lily saw Tom.", ["Tom", "Lily"])
    assert not all_kept("Lily saw a tom.", ["Tom", "Lily"])


def test_names_of_prompt_and_opening_are_looked_for_behind_the_opening() -> None:
    opening = " She met Max and a cat." + " and so on" * 12
    assert len(opening.split()) > OPENING_WORDS
    prompt = "Lily went out."
    assert share_kept(prompt, opening + " Lily said to Max: hello.", ["Lily"]) == 1
    assert share_kept(prompt, opening + " Max slept.", ["Lily"]) == 0.5
    assert share_kept(prompt, opening + " They slept.", ["Lily"]) == 0
    assert share_kept(prompt, " Lily slept.", ["Lily"]) is None, "over with its opening"
    assert share_kept("it rained.", opening.replace("Max", "a fox") + " It rained on.", []) is None, "no name"


@given(st.text("ab \n.", max_size=300), st.integers(1, 50))
def test_an_opening_and_the_rest_are_the_whole(text: str, count: int) -> None:
    opening, rest = split_opening(text, count)
    assert opening + rest == text
    assert len(opening.split()) == min(count, len(text.split()))


@pytest.mark.parametrize(
    ("text", "confused"),
    [
        ('Tom said, "Come, Tom!" Lily ran.', True),
        ('Tom asked: "Where is Tom?" Lily did not know.', True),
        ('Tom said, "Come, Lily!" They ran.', False),
        ('Tom said, "Come!" Then Lily said, "Tom, wait!"', False),
        ('"I am Tom," said Tom to Lily.', False),
    ],
)
def test_only_who_speaks_to_himself_by_name_is_confused(text: str, confused: bool) -> None:
    assert speaks_to_himself(text, ["Lily", "Tom"]) == confused


PROMPT = Prompt("Lily and Tom went to the park.", ("Lily", "Tom"))


def story(text: str, *, number: int = 0, seed: int = 0, ended: bool = True) -> WrittenStory:
    return WrittenStory(PROMPT, number, seed, text, 2 * len(text.split()), ended)


def test_shares_of_ended_and_of_kept_names_are_means_over_stories() -> None:
    stories = [story("Lily saw Tom."), story("Lily ran home.", number=1, ended=False)]
    means = {name: estimate.value for name, estimate in Written.measure(stories).estimates().items()}
    assert (means["ended"], means["names_kept"], means["names_straight"]) == (0.5, 0.5, 0.5)
    assert (means["mean_tokens"], means["mean_words"]) == (6, 3)


def test_a_name_that_is_kept_and_confused_is_not_straight() -> None:
    figures = story_figures(story('Tom said, "Come, Tom!" Lily ran.'))
    assert [figures[f"names_{what}"] for what in ("kept", "confused", "straight")] == [1, 1, 0]


def test_a_story_that_goes_round_is_looping() -> None:
    assert story_figures(story("the cat sat down " * 20))["looping"] == 1
    assert story_figures(story("the cat sat down and slept"))["looping"] == 0


def test_a_story_of_no_words_has_no_shares_and_counts_for_the_rest() -> None:
    figures = story_figures(story(""))
    assert [figures[name] for name in ("distinct_2", "repeated_4", "looping", "names_kept")] == [None, None, 0, 0]
    estimates = Written.measure([story(""), story("Lily and Tom.", number=1)]).estimates()
    assert (estimates["distinct_2"].n, estimates["ended"].n) == (1, 2)
    assert "repeated_4" not in estimates, "no story is four words long"


def test_copies_are_measured_only_where_training_stories_were_given() -> None:
    stories = [story("the fox ran to the red barn and slept")]
    assert Written.measure(stories).longest_copy is None
    assert "copied_words" not in Written.measure(stories).estimates()
    copies = longest_copies([one.text for one in stories], ["A dog ran to the red barn and sang."])
    measured = Written.measure(stories, copies)
    assert measured.estimates()["copied_words"].value == 6
    assert measured.estimates()["copied_share"].value == pytest.approx(6 / 9)
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
    output = written(3).as_dict()
    assert (output["stories"], output["seeds"]) == (6, [0, 1, 2])
    assert output["names_kept"] == 0.5
    assert output["ended"] == pytest.approx(1 / 3)
    assert output["copied_words_max"] == 7
    for name, (low, high) in output["intervals"].items():
        assert low <= output[name] <= high


TEXT = st.lists(st.sampled_from(["a", "b", "Cat"]), max_size=25).map(" ".join)


def by_search(text: str, training: list[str]) -> int:
    """Length of the longest common run of words, by trying all."""
    sequence, best = words(text), 0
    for other in map(words, training):
        for i in range(len(sequence)):
            for j in range(len(other)):
                length = 0
                while (
                    i + length < len(sequence) and j + length < len(other) and sequence[i + length] == other[j + length]
                ):
                    length += 1
                best = max(best, length)
    return best if best >= ANCHOR else 0


@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, max_size=4))
def test_the_longest_run_is_the_one_a_search_of_all_runs_finds(written: list[str], training: list[str]) -> None:
    copies = longest_copies(written, training)
    for text, copy in zip(written, copies, strict=True):
        assert copy.words == by_search(text, training)
        if copy.words:
            (source,) = {other for other in training if story_id(other) == copy.story}
            assert f" {copy.text} " in f" {' '.join(words(text))} "
            assert f" {copy.text} " in f" {' '.join(words(source))} "
            assert copy.share == copy.words / len(words(text))


def test_case_and_punctuation_hide_no_copy() -> None:
    training = ["Once there was a fox.", "He saw the big, red barn; and slept!"]
    (copy,) = longest_copies(["Then he saw the big red barn. And slept well."], training)
    assert copy.text == "he saw the big red barn and slept"
    assert (copy.words, copy.story) == (8, story_id(training[1]))


def test_no_run_reaches_from_one_story_into_the_next() -> None:
    training = ["one two three four", "five six seven eight"]
    written = ["one two three four five six seven eight"]
    assert longest_copies(written, training)[0].words == 0
    assert longest_copies(["a b c d", "e f g h"], ["a b c d e f g h"])[0].words == 0


def test_without_sources_it_is_the_training_part_of_our_own_corpus() -> None:
    training = TrainingTexts.of([])
    assert list(training) == [story.text for story in load_own_stories("train")]
    assert training.name == "our own corpus"


def test_files_and_folders_are_read_again_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": f"A story of {name}."}) + "\n")
    training = TrainingTexts.of([folder, folder / "b.jsonl"])
    expected = ["A story of a.", "A story of b.", "A story of b."]
    assert list(training) == list(training) == expected
    assert training.name == "tales, b.jsonl"


def test_shards_give_back_the_texts_they_were_made_of(tmp_path: Path) -> None:
    texts = [story.text for story in load_own_stories("train")]
    source = tmp_path / "own.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    prepare(PrepareOptions(sources=(source,), out=tmp_path / "shards", vocab_size=512, val_fraction=0.02))
    read = list(TrainingTexts.of([tmp_path / "shards"]))
    assert len(texts) * 0.9 < len(read) < len(texts)
    assert set(read) <= set(texts)


def test_a_source_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        TrainingTexts.of([tmp_path / "none.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no story files"):
        TrainingTexts.of([tmp_path / "empty"])
