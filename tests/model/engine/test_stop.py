"""Stop strings in a stream, against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from model.engine.stream import StopMatcher

LETTERS = "ab.\n"
WORDS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)


def reference(text: str, words: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [word for word in words if text[:end].endswith(word)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def longest_open(text: str, words: list[str]) -> int:
    return max(n for word in words for n in range(len(word)) if text.endswith(word[:n]))


@given(st.lists(st.text(LETTERS, max_size=7), max_size=12), WORDS)
def test_the_chunks_give_what_the_whole_text_gives(chunks: list[str], words: list[str]) -> None:
    matcher = StopMatcher(words)
    released = "".join([matcher.push(chunk) for chunk in chunks])
    assert (released + matcher.flush(), matcher.stopped) == reference("".join(chunks), words)


@given(st.text(LETTERS, max_size=30), WORDS)
def test_never_more_is_held_back_than_may_become_a_stop_string(text: str, words: list[str]) -> None:
    matcher = StopMatcher(words)
    seen = ""
    for letter in text:
        matcher.push(letter)
        seen += letter
        if matcher.stopped:
            break
        assert len(matcher.held) == longest_open(seen, words)
        assert seen.endswith(matcher.held)


def test_a_stop_string_across_chunks_never_shows() -> None:
    matcher = StopMatcher(["The End"])
    assert [matcher.push(chunk) for chunk in ("and slept. ", "Th", "e E", "nd of it")] == ["and slept. ", "", "", ""]
    assert matcher.stopped
    assert matcher.push("more") == matcher.flush() == ""


def test_text_that_only_began_like_a_stop_string_is_released() -> None:
    matcher = StopMatcher(["The End"])
    assert [matcher.push(chunk) for chunk in ("Th", "e ", "Elf")] == ["", "", "The Elf"]
    assert matcher.push("T") + matcher.flush() == "T"


def test_one_chunk_may_hold_the_stop_string_and_more() -> None:
    matcher = StopMatcher(["###", "\n\n"])
    assert matcher.push("a#b\n\nc###") == "a#b"
    assert matcher.stopped
