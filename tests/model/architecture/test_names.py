"""Names that stay spelled as they were: against regular expressions over the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.folder import PRETRAINED
from model.architecture.names import FORBIDDEN, MAX_NAMES, NameSpeller, WordTable
from model.architecture.tokenizer import StoryTokenizer
from tests.model.spelling import misspelling, names_of

PIECES = (
    *(b"", b" ", b"Em", b" Em", b"em", b"ber", b"b", b"er", b" Zo", b"Zo", "ë".encode(), "ë".encode()[:1], b"\xab"),
    *(
        b" and",
        b" sat",
        b".",
        b' "',
        b'"',
        b",",
        b"\n",
        b"s",
        b" I",
        b"n",
        b"grid",
        b" Be",
        b" be",
        b"W",
        b"We",
        b"ndy",
    ),
)
TABLE = WordTable(PIECES, len(PIECES) + 1)


@given(st.lists(st.sampled_from(range(len(PIECES))), max_size=30))
def test_a_token_is_forbidden_exactly_where_the_text_shows_that_it_misspells_a_name(story: list[int]) -> None:
    speller = NameSpeller(TABLE)
    for place, token in enumerate([*story, 0]):
        forbidden_V = speller.forbidden()
        wrong = misspelling(PIECES, story[:place])
        if forbidden_V is None:
            assert not wrong.any()
        else:
            assert set(forbidden_V.tolist()) == {0.0, FORBIDDEN}
            assert ((forbidden_V == FORBIDDEN) == [*wrong, True]).all()  # the last id is no token
        speller.push(token)
    assert speller.names == names_of(b"".join(PIECES[token] for token in story), {data.strip() for data in PIECES})
    assert NameSpeller(TABLE, [*story, 0]).names == speller.names


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer.load(PRETRAINED)


def tokens_after(tokenizer: StoryTokenizer, text: str) -> set[str] | None:
    """What may follow `text`; None: anything."""
    speller = NameSpeller(tokenizer.masks(tokenizer.vocab_size).words, tokenizer.encode(text))
    forbidden_V = speller.forbidden()
    return None if forbidden_V is None else {tokenizer.decode([token]) for token in (forbidden_V == 0).nonzero()[0]}


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("Quibbly had a kite. Then Qui", {"b", "bb"}),  # "bbl" and so on are no tokens
        ("Quibbly and Quinoa had a kite. Then Qui", {"b", "bb", "n"}),
        ('"Hello," said Quibbly. "Quibbl', {"y"}),
    ],
)
def test_within_a_name_only_its_letters_follow(tokenizer: StoryTokenizer, text: str, following: set[str]) -> None:
    assert tokens_after(tokenizer, text) == following


def test_after_a_name_the_word_ends(tokenizer: StoryTokenizer) -> None:
    allowed = tokens_after(tokenizer, "Quibbly had a kite. Then Quibbly")
    assert allowed is not None
    assert {"", " ", ".", ",", " had"} <= allowed
    assert not any(token[:1].isalpha() for token in allowed)


def test_a_word_that_opens_sentences_may_end_though_a_name_begins_like_it(tokenizer: StoryTokenizer) -> None:
    allowed = tokens_after(tokenizer, "Ingridine had a kite. In")
    assert allowed is not None
    assert {" the", ",", "g"} <= allowed
    assert not {"side", "st", "n"} & allowed


@pytest.mark.parametrize(
    "text",
    [
        "Quibbly had a kite. Then qui",  # no capital
        "Quibbly had a kite. Then Bo",  # no name begins so
        '"Quibbly!" said Tom. "Qui',  # what opens a quotation may be an exclamation
        "Quibbly had a kite. Then",
        "Qui",
        "",
    ],
)
def test_elsewhere_every_token_may_follow(tokenizer: StoryTokenizer, text: str) -> None:
    assert tokens_after(tokenizer, text) is None


def test_a_story_has_so_many_names_and_no_more(tokenizer: StoryTokenizer) -> None:
    names = ["Qx" + "".join(chr(97 + (number // 26**place) % 26) for place in range(3)) for number in range(80)]
    speller = NameSpeller(tokenizer.masks(tokenizer.vocab_size).words, tokenizer.encode(" ".join(names) + " sat"))
    assert speller.names == [name.encode() for name in names[:MAX_NAMES]]
