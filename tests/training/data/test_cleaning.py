"""Repair changes the writing and never the words; a dropped story has one named reason."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.corpus import load_own_stories
from training.data.pool import REASONS, repair, why_dropped

GOOD = 'Mia found a small red boat by the pond. "Is it yours?" she asked the duck. The duck said nothing.'

# Characters that the rules speak of, so that random texts meet them often.
TRICKY = st.text(
    st.sampled_from(
        "abÂÃâ€œ\u2018\u2019\u201c\u201d\u2013\u2014\u2026©\u00a0\u00ad\u200b\ufeff\u0301\u2028"
        "\x0b\x1c\r\n\t <|endoftext|>é"
    )
)


def reason(text: str) -> str | None:
    return why_dropped(text, min_chars=50, max_chars=1000)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("\u201cIt\u2019s me,\u201d he said.", '"It\'s me," he said.'),
        ("She ran\u2014fast\u2026", "She ran - fast..."),
        ("well\u2011known so\u00adft zero\u200bwidth", "well-known soft zerowidth"),
        ("two  spaces\u00a0and\ttabs \n\n\n next\r\nline ", "two spaces and tabs\nnext\nline"),
        ("cafe\u0301", "caf\u00e9"),
        ("one<|endoftext|>two", "one\ntwo"),
        (" \n\t\ufeff", ""),
    ],
)
def test_typography_becomes_plain(written: str, plain: str) -> None:
    assert repair(written) == plain


@pytest.mark.parametrize("text", ["\u2019", "\u201c", "\u201d", "\u2014", "é", "à", "Zoë", "brûlée", "£"])
def test_utf8_once_read_as_windows_1252_is_undone(text: str) -> None:
    # Two independent ways to the same text: through the damage and back, or never damaged. Bytes that
    # Windows-1252 leaves open were passed through as control characters by the programs that did the damage.
    damaged = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    assert damaged != text
    assert repair(f"a{damaged}b") == repair(f"a{text}b")


@pytest.mark.parametrize("text", ['"CAFÉ" it said.', "Ålesund", "château", "São Paulo", "naïve âme"])
def test_honest_accents_stay(text: str) -> None:
    assert repair(text) == text


@given(st.one_of(st.text(), TRICKY))
def test_repairing_twice_changes_nothing_more(text: str) -> None:
    once = repair(text)
    assert repair(once) == once


@given(st.one_of(st.text(), TRICKY))
def test_repaired_text_is_normal_and_has_single_spaces_and_no_end_mark(text: str) -> None:
    text = repair(text)
    assert unicodedata.is_normalized("NFC", text)
    assert "<|endoftext|>" not in text
    assert text == text.strip()
    assert "  " not in text
    assert "\n\n" not in text


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_repair_never_touches_plain_words(word: str) -> None:
    if "<|endoftext|>" not in word:
        assert repair(f"{word} {word}\n{word}") == f"{word} {word}\n{word}"


def test_our_own_stories_need_no_repair_and_all_stay() -> None:
    for story in load_own_stories():
        assert repair(story.text) == story.text
        assert why_dropped(story.text, min_chars=100, max_chars=100_000) is None, story.title


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, None),
        (GOOD[:-1] + '!"', None),
        ("", "empty"),
        ("Too short.", "too short"),
        (GOOD * 11, "too long"),
        (GOOD + " <b>Bold.</b>", "markup"),
        (GOOD + " See https://example.com.", "markup"),
        (GOOD + "\n## The end.", "markup"),
        (GOOD + " Salt &amp; pepper.", "markup"),
        (GOOD + " <|pad|>.", "markup"),
        (GOOD + " \x07.", "odd characters"),
        (GOOD + " \ufffd.", "odd characters"),
        ("Жила-была девочка, и звали её Маша. Она любила лес и реку, и мёд, и тихие вечера.", "odd characters"),
        ("1 2 3 4 5 6 7 8 9 " * 4 + ".", "odd characters"),
        (GOOD[1:], "starts mid-sentence"),
        (", and so " + GOOD, "starts mid-sentence"),
        (GOOD[:-1], "cut off"),
        (GOOD[:-1] + ",", "cut off"),
    ],
)
def test_each_fault_has_its_reason(text: str, expected: str | None) -> None:
    assert reason(text) == expected
    assert expected is None or expected in REASONS


def test_a_lone_ampersand_or_angle_is_no_markup() -> None:
    assert reason(GOOD + " Salt & pepper, 2 < 3.") is None


@given(st.text())
def test_any_text_gets_an_answer(text: str) -> None:
    assert reason(repair(text)) in (None, *REASONS)
