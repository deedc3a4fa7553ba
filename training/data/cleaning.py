"""Clean stories before training.

`repair` normalises the writing (Unicode form, quotes, dashes, spaces) and never the words, so it applies to validation
stories too. `why_dropped` filters training stories and names the reason.
"""

import re
import unicodedata

from training.data.bpe import END_OF_STORY

# UTF-8 that was once read as Windows-1252 shows as one of these lead characters and its continuation bytes.
# Only the leads of Latin letters and of typographic punctuation are taken: others occur in honest text
# ("CAFÉ" and a quote).
_BYTE_OF_CHAR = {bytes([b]).decode("cp1252", "ignore") or chr(b): b for b in range(0x80, 0x100)}
_CONTINUATION = "[" + "".join(re.escape(char) for char, byte in _BYTE_OF_CHAR.items() if byte < 0xC0) + "]"
_MOJIBAKE = re.compile(f"[ÂÃ]{_CONTINUATION}|â{_CONTINUATION}{{2}}")

_PLAIN: dict[int, str] = (
    dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\uff07"), "'")
    | dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02"), '"')
    | dict.fromkeys(map(ord, "\u2010\u2011\u2212"), "-")
    | dict.fromkeys(map(ord, "\u2013\u2014\u2015"), " - ")
    | dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"), "")
    | {ord("\u2026"): "..."}
)

_MARKUP = re.compile(
    r"</?[A-Za-z!][^<>\n]{0,200}>|<\||https?://|www\.|```|\{\{|\[\[|&(?:[a-z]{2,6}|#\d{1,5});|(?m:^#{1,6} )"
)
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")
_LETTERS_AND_SPACES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ \n"
_MIN_LETTER_SHARE = 0.7
_CLOSING = frozenset(".!?\"')]*")

REASONS = ("empty", "too short", "too long", "markup", "odd characters", "starts mid-sentence", "cut off")


def _undo_mojibake(match: re.Match[str]) -> str:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in match.group()).decode("utf-8")
    except UnicodeDecodeError:
        return match.group()


def repair(text: str) -> str:
    """Normalise a story: NFC, straight quotes, ` - ` for a dash, single spaces, no blank lines; may return "".

    Undoes UTF-8 that was read as Windows-1252. An end-of-story mark inside the text becomes a line end, because the
    tokenizer would read it as the end. Idempotent.
    """
    text = text.replace(END_OF_STORY, "\n")
    while not text.isascii():  # each round undoes one layer; a plain English text is ASCII after one or two
        before = text
        text = unicodedata.normalize("NFC", _MOJIBAKE.sub(_undo_mojibake, unicodedata.normalize("NFC", text)))
        text = text.translate(_PLAIN).replace(END_OF_STORY, "\n")
        if text == before:
            break
    return "\n".join(line for raw in text.splitlines() if (line := " ".join(raw.split())))


def why_dropped(text: str, *, min_chars: int, max_chars: int) -> str | None:
    """Return the reason (one of `REASONS`) to drop a repaired text from training, or None to keep it."""
    if not text:
        return "empty"
    if len(text) < min_chars:
        return "too short"
    if len(text) > max_chars:
        return "too long"
    if _MARKUP.search(text):
        return "markup"
    data = text.encode()
    others = len(data.translate(None, _LETTERS_AND_SPACES))
    if others > (1 - _MIN_LETTER_SHARE) * len(data) or _CONTROL.search(text):
        return "odd characters"
    if text[0].islower() or text[0] in ",;:.!?)]}":
        return "starts mid-sentence"
    if text[-1] not in _CLOSING:
        return "cut off"
    return None
