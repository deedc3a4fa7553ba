"""The line with a prompt's names that the model reads before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.quality.generation import RARE_PROMPTS, Prompt, load_prompts
from model.architecture.folder import END_ID
from model.engine.title import MOST_NAMES, names_in, split_title, title_of
from tests.model.engines import TOKENIZER, engine, request

PARTS = ["Ember", "Kofi", "Zoë", "the", "fox", "Once", "and", "met", ".", ",", "\n", "Mr.", "I", "\u201c", "said"]


@pytest.mark.parametrize("prompt", [*load_prompts(), *load_prompts(RARE_PROMPTS)], ids=lambda prompt: prompt.text)
def test_the_names_of_the_evaluations_prompts_are_found(prompt: Prompt) -> None:
    assert set(prompt.names) <= set(names_in(prompt.text)) <= {*prompt.names, "Grandma"}


@pytest.mark.parametrize(
    ("prompt", "title"),
    [
        ("Once upon a time there was a fox who could not sleep.", ""),
        ("The old boat had a secret.", ""),
        ("Beneath the old oak, a fox slept.", ""),
        ("Suddenly, the door opened. Nobody came.", ""),
        ("ONCE UPON A TIME", ""),
        ("One day, I saw Lily's dog.", "Lily.\n\n"),
        ("Mia found a key.", "Mia.\n\n"),
        ("Lily, a small girl, cried.", "Lily.\n\n"),
        ("Zuri's cat met Kofi. Zuri laughed.", "Zuri and Kofi.\n\n"),
        ('"Wow!" said Tom. "Look at Zuri!"', "Tom and Zuri.\n\n"),
        ("Mr. Whiskers met Captain Blueberry in Spain.", "Mr. Whiskers, Captain Blueberry and Spain.\n\n"),
        ("Ann met Bea, Cal, Dan, Eve and Fay.", "Ann, Bea, Cal and Dan.\n\n"),
        ("One day Zoë met the girl O\u2019Brien-Smith.", "Zoë and O\u2019Brien-Smith.\n\n"),
        ("", ""),
    ],
)
def test_names_are_found_by_their_form(prompt: str, title: str) -> None:
    assert title_of(prompt) == title


@given(st.text() | st.lists(st.sampled_from(PARTS)).map(" ".join))
def test_a_title_holds_names_of_the_prompt_and_nothing_else(prompt: str) -> None:
    names = names_in(prompt)
    assert len(names) <= MOST_NAMES
    assert all(name in prompt and name[0].isupper() for name in names)
    assert len(set(names)) == len(names)
    assert title_of(prompt).endswith(".\n\n") if names else title_of(prompt) == ""


@pytest.mark.parametrize(
    ("prompt", "words", "title"),
    [
        ("Lily had a dog.", ("cake",), "Lily and the cake.\n\n"),
        ("A fox ran.", ("cake", "hat"), "The cake and the hat.\n\n"),
        ("Lily met Tom.", ("Tom", "Mia", "hat"), "Lily, Tom, Mia and the hat.\n\n"),
        ("A fox ran.", (), ""),
    ],
)
def test_wished_words_are_listed_behind_the_names(prompt: str, words: tuple[str, ...], title: str) -> None:
    assert title_of(prompt, words) == title
    assert title_of(prompt, words, names=False) == title_of("A fox ran.", words)


@given(
    prompt=st.lists(st.sampled_from(PARTS)).map(" ".join),
    story=st.text() | st.lists(st.sampled_from(PARTS)).map(" ".join),
    words=st.lists(st.sampled_from(["fox", "Ember", "Zoë"]), max_size=2).map(tuple),
    names=st.booleans(),
)
def test_a_title_is_found_again_before_the_story(prompt: str, story: str, words: tuple[str, ...], names: bool) -> None:
    title = title_of(prompt, words, names=names)
    if title:  # what follows the names of the prompt may only add others behind them
        found = split_title(f"{title}{prompt}. {story}", words)
        assert found == (title, f"{prompt}. {story}") or names_in(f"{prompt}. {story}")[:1] != names_in(prompt)[:1]
    assert split_title("A fox ran.\n\nIt slept.", words) == ("", "A fox ran.\n\nIt slept.")


def test_the_engine_reads_the_title_before_a_text_and_not_before_tokens() -> None:
    text = "One day Ember met Kofi."
    titled, plain = TOKENIZER.encode(f"Ember and Kofi.\n\n{text}"), TOKENIZER.encode(text)
    with engine() as e:

        def story(prompt: str | tuple[int, ...], *, keep_names: bool = True) -> tuple[str, int]:
            asked = request(seed=5)
            sampling = replace(asked.sampling, keep_names=keep_names)
            done = e.submit(replace(asked, prompt=prompt, sampling=sampling)).wait(10)
            return done.text, done.usage.prompt_tokens

        assert story(text)[0] == story((END_ID, *titled))[0] != story((END_ID, *plain))[0]
        assert story(text)[1] == len(titled)
        assert story(text, keep_names=False) == (story((END_ID, *plain), keep_names=False)[0], len(plain))
        assert story("One day a fox came.")[1] == len(TOKENIZER.encode("One day a fox came."))


def test_a_prompt_that_comes_back_is_scored_as_it_is() -> None:
    text = "One day Ember met Kofi."
    with engine() as e:
        done = e.submit(request(text, max_tokens=0, echo=True)).wait(10)
    assert done.prompt is not None
    assert list(done.prompt.tokens) == TOKENIZER.encode(text)
    assert done.usage.prompt_tokens == len(TOKENIZER.encode(text))
