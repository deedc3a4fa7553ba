"""The bounded search finds what comparing all pairs finds, and drops nothing that is no copy."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import dedup
from training.data.corpus import load_own_stories
from training.data.dedup import MINIMA, SHARED_RUNS, DuplicateFinder, Duplicates, run_hashes, shared_share, words

OWN = [story.text for story in load_own_stories()]
WORDS = sorted({word for text in OWN for word in words(text)})


def search(texts: list[str], reference: list[bool] | None = None, keep: bool = False, seed: int = 0) -> Duplicates:
    finder = DuplicateFinder(seed)
    for start in range(0, len(texts), 7):  # in odd batches, so that their borders are tested too
        finder.add(texts[start : start + 7])
    marked = None if reference is None else np.array(reference)
    return finder.find(texts.__getitem__, reference=marked, keep_reference=keep)


def random_story(rng: random.Random, length: int = 150) -> str:
    return " ".join(rng.choices(WORDS, k=length)).capitalize() + "."


def changed(text: str, share: float, rng: random.Random) -> str:
    """The text with one stretch of its words replaced, so that about `share` of its 8-word runs stay."""
    kept = text.split()
    count = int(len(kept) * (1 - share))
    start = rng.randrange(len(kept) - count)
    return " ".join([*kept[:start], *rng.choices(WORDS, k=count), *kept[start + count :]])


def true_share(a: str, b: str) -> float:
    """The definition in plain Python, on the words themselves."""
    runs_a, runs_b = ({tuple(w[i : i + 8]) for i in range(len(w) - 7)} for w in (words(a), words(b)))
    smaller = min(len(runs_a), len(runs_b))
    return len(runs_a & runs_b) / smaller if smaller else 0.0


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_the_hashed_share_of_runs_is_the_true_one(a: list[str], b: list[str]) -> None:
    # Three words only, so that runs repeat within a text and between both.
    text_a, text_b = " ".join(a), " ".join(b)
    assert shared_share(run_hashes(text_a), run_hashes(text_b)) == pytest.approx(true_share(text_a, text_b))


def test_copies_that_differ_in_case_punctuation_and_spaces_are_exact() -> None:
    texts = ["The cat sat. On the mat!", "A dog ran.", "the CAT sat on\nthe mat", "The cat sat on the hat."]
    found = search(texts)
    assert found.exact.tolist() == [False, False, True, False]
    assert not found.near.any()


def test_planted_near_copies_are_found_and_nothing_else() -> None:
    rng = random.Random(1)
    originals = [random_story(rng) for _ in range(300)]
    copies = [changed(text, rng.uniform(0.5, 0.9), rng) for text in originals[:100]]
    found = search(originals + copies)
    expected = [False] * 300 + [true_share(a, b) >= SHARED_RUNS for a, b in zip(originals[:100], copies, strict=True)]
    assert sum(expected) > 90
    assert found.near.tolist() == expected
    assert not found.exact.any()


def test_at_the_very_limit_nearly_all_are_found() -> None:
    # 0.995 of the pairs with a resemblance of 0.25 are proposed; 400 pairs leave room for chance.
    rng = random.Random(2)
    originals = [random_story(rng, 300) for _ in range(400)]
    copies = [changed(text, 0.44, rng) for text in originals]
    pairs = list(zip(originals, copies, strict=True))
    wanted = np.array([true_share(a, b) >= SHARED_RUNS for a, b in pairs])
    found = search(originals + copies).near[400:]
    assert wanted.sum() > 300
    assert not (found & ~wanted).any()
    assert found.sum() >= 0.97 * wanted.sum()


def test_a_worn_opening_is_no_reason_to_drop() -> None:
    rng = random.Random(3)
    opening = "Once upon a time there was a little girl named Lily who loved to play in the park. "
    texts = [opening + random_story(rng, 120) for _ in range(400)]
    texts += [changed(texts[i], 0.8, rng) for i in range(0, 400, 10)]
    found = search(texts)
    assert not found.near[:400].any()
    assert found.near[400:].all()


def test_of_many_near_copies_the_first_stays_alone() -> None:
    # More than the window holds, so they are found through the story that stands for those already gone.
    rng = random.Random(4)
    first = random_story(rng, 200)
    texts = [first, *(changed(first, 0.9, rng) for _ in range(5 * dedup.WINDOW))]
    found = search(texts)
    assert found.near.tolist() == [False] + [True] * (5 * dedup.WINDOW)


def test_our_own_stories_are_all_different_by_both_ways_of_looking() -> None:
    found = search(OWN)
    assert not (found.exact | found.near).any()
    runs = [run_hashes(text) for text in OWN]
    assert max(shared_share(a, b) for i, a in enumerate(runs) for b in runs[:i]) < SHARED_RUNS


def test_a_copy_in_both_splits_leaves_the_training_split() -> None:
    rng = random.Random(5)
    story, other = random_story(rng), random_story(rng)
    near = changed(story, 0.8, rng)
    # train: story, other, an exact copy of the second validation story; validation: near, its copy, a new one
    new = random_story(rng)
    texts = [story, other, new, near, near.upper(), new]
    reference = [False, False, False, True, True, True]
    found = search(texts, reference)
    assert found.near.tolist() == [True, False, False, False, False, False]
    assert found.exact.tolist() == [False, False, True, False, True, False]
    kept_whole = search(texts, reference, keep=True)
    assert kept_whole.near.tolist() == [True, False, False, False, False, False]
    assert kept_whole.exact.tolist() == [False, False, True, False, False, False]


def test_stories_shorter_than_a_run_are_judged_by_exact_copies_alone() -> None:
    found = search(["Run!", "Stop!", "One two three four five six seven.", "", "run", ""])
    assert found.exact.tolist() == [False, False, False, False, True, True]
    assert not found.near.any()


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from(WORDS[:40]), max_size=40), max_size=25), st.integers(0, 2**31))
def test_what_stays_has_no_exact_copy_and_what_goes_is_a_copy_of_what_stays(
    stories: list[list[str]], seed: int
) -> None:
    texts = [" ".join(story) for story in stories]
    found = search(texts, seed=seed)
    gone = found.exact | found.near
    assert not (found.exact & found.near).any()
    kept = [text for text, out in zip(texts, gone, strict=True) if not out]
    assert len({tuple(words(text)) for text in kept}) == len(kept)
    for text, near in zip(texts, found.near, strict=True):
        assert not near or max(true_share(text, other) for other in kept) >= SHARED_RUNS


def test_the_batches_in_which_stories_come_change_nothing() -> None:
    rng = random.Random(6)
    texts = OWN[:30] + [changed(text, 0.7, rng) for text in OWN[:30]]
    one = DuplicateFinder()
    one.add(texts)
    assert one.find(texts.__getitem__).near.tolist() == search(texts).near.tolist()


def test_a_forgotten_word_is_hashed_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_hashes(OWN[0]).tolist()
    monkeypatch.setattr(dedup, "_KNOWN_WORDS", 5)
    assert run_hashes(OWN[0]).tolist() == before


def test_another_process_hashes_words_the_same() -> None:
    code = "from training.data.dedup import run_hashes; print(run_hashes('a b c d e f g h i').tolist())"
    results = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": salt, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert results == {f"{run_hashes('a b c d e f g h i').tolist()}\n"}


def test_memory_is_what_the_class_says() -> None:
    finder = DuplicateFinder()
    finder.add(OWN)
    used = sum(len(column) * column.itemsize for column in (finder._minima, finder._exact))
    assert used == len(OWN) * (2 * MINIMA + 8)
