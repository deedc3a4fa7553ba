"""Hold the stories of one corpus between reading and writing: clean, filter, split, deduplicate, tokenise.

Texts are on disk; memory holds what the duplicate search needs, about 150 bytes a story.
"""

import hashlib
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.errors import DataError
from training.data.corpus import BadLineHandler, Story, read_stories, story_id
from training.data.dedup import DuplicateFinder
from training.data.rename import Renamed, Renamer
from training.data.shards import END_OF_STORY, ShardWriter, train_tokenizer

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


MIN_BYTES_PER_TOKEN = 64
"""Training text that a tokenizer needs for each token (262,144 bytes for 4,096)."""

TOKENIZER_SAMPLE_BYTES = 256 * 1024 * 1024
"""From a larger corpus the tokenizer is trained on a sample of about this size, chosen story by story."""

HELD_OUT_MARKS = frozenset({"heldout", "held-out", "val", "valid", "validation", "test"})
"""A record with one of these as its "split" is never trained on."""

_BATCH_CHARS = 1024 * 1024

Step = Callable[[float], None]
"""Called with the work done since the last call."""


class StoryPool:
    """Takes stories in, file by file, then drops duplicates, trains the tokenizer and writes shards."""

    def __init__(
        self,
        spool_path: Path,
        *,
        val_fraction: float | None,
        min_chars: int,
        max_chars: int,
        seed: int,
        on_bad: BadLineHandler | None,
    ) -> None:
        """`val_fraction` None means that validation files are given and nothing is split off."""
        self._spool = StorySpool(spool_path)
        self._val_fraction = val_fraction
        self._limits = (min_chars, max_chars)
        self._seed = seed
        self._on_bad = on_bad
        self._is_val = bytearray()
        self._kept: NDArray[np.bool_] | None = None
        self._finder = DuplicateFinder(seed)
        self.dropped: Counter[str] = Counter()
        self.renamed: Counter[str] = Counter()

    def close(self) -> None:
        self._spool.close()

    def read(self, path: Path, *, validation: bool, on_bytes: Step | None = None) -> int:
        """Take in one file and return how many stories it holds; validation files are repaired but not filtered."""
        count = 0

        def texts() -> Iterator[str]:
            nonlocal count
            for story in read_stories(path, on_bad=self._on_bad, on_bytes=on_bytes):
                count += 1
                if (text := self._take(story, validation)) is not None:
                    yield text

        for batch in _batches(texts()):
            self._finder.add(batch)
        return count

    def _take(self, story: Story, validation: bool) -> str | None:
        """Park a story in its split and return its text, or count why not."""
        text = repair(story.text)
        marked = story.split.lower() in HELD_OUT_MARKS
        if validation or (marked and self._val_fraction is not None):
            is_val, reason = True, None if text else "empty"
        elif marked:
            is_val, reason = False, "held out"
        else:
            reason = why_dropped(text, min_chars=self._limits[0], max_chars=self._limits[1])
            by_hash = self._val_fraction is not None and story.split.lower() != "train"
            is_val = reason is None and by_hash and self._share(text, "split") < (self._val_fraction or 0)
        if reason:
            self.dropped[reason] += 1
            return None
        self._spool.append(text)
        self._is_val.append(is_val)
        return text

    def _share(self, text: str, purpose: str) -> float:
        """A number in [0, 1) that depends on the story, the seed and the purpose alone."""
        key = f"{purpose}:{self._seed}:{story_id(text)}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=6).digest(), "big") / (1 << 48)

    def drop_duplicates(self, on_band: Callable[[], None] | None = None) -> None:
        """Leave out copies; one that both splits hold leaves train, and validation files that were given stay whole."""
        is_val = np.frombuffer(self._is_val, np.bool_)
        found = self._finder.find(
            self._spool.__getitem__, reference=is_val, keep_reference=self._val_fraction is None, on_band=on_band
        )
        self._finder = DuplicateFinder(self._seed)  # gives its memory back before the tokenizer wants some
        self._kept = ~(found.exact | found.near)
        for reason, gone in (("exact duplicate", found.exact), ("near duplicate", found.near)):
            if count := int(gone.sum()):
                self.dropped[reason] += count

    def numbers(self, split: str) -> NDArray[np.int64]:
        """The stories of one split ("train" or "val") that are left, in the order of the files."""
        is_val = np.frombuffer(self._is_val, np.bool_)
        chosen = is_val if split == "val" else ~is_val
        return np.flatnonzero(chosen if self._kept is None else chosen & self._kept)

    def _texts(self, split: str) -> Iterator[str]:
        return map(self._spool.__getitem__, map(int, self.numbers(split)))

    def size(self, split: str) -> int:
        return int(self._spool.sizes()[self.numbers(split)].sum())

    def check(self, vocab_size: int | None) -> None:
        """Raise `DataError` if a split is empty, or too small to train a tokenizer of `vocab_size`."""
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common()) or "nothing"
        size = self.size("train")
        if not size:
            raise DataError(f"no training story is left (dropped: {lost})")
        if not len(self.numbers("val")):
            given = self._val_fraction is None
            advice = "the files of --val hold none" if given else "raise --val-fraction, or give --val FILE"
            raise DataError(f"no validation story is left: {advice} (dropped: {lost})")
        if vocab_size is not None and size < MIN_BYTES_PER_TOKEN * vocab_size:
            raise DataError(
                f"too small a corpus: {size:,} bytes of training text, but a tokenizer of {vocab_size:,} "
                f"tokens needs {MIN_BYTES_PER_TOKEN * vocab_size:,}; give more text, a smaller --vocab-size "
                f"or a ready --tokenizer (dropped: {lost})"
            )

    def train_tokenizer(self, vocab_size: int, on_bytes: Step | None = None) -> Tokenizer:
        """Train on the training split, or on a sample of a large one. Raises `DataError` for too uniform a text."""
        size = self.size("train")
        share = TOKENIZER_SAMPLE_BYTES / size

        def texts() -> Iterator[str]:
            for batch in _batches(self._texts("train")):
                if on_bytes:
                    on_bytes(sum(len(text.encode()) for text in batch))
                yield from (text for text in batch if share >= 1 or self._share(text, "tokenizer") < share)

        tokenizer = train_tokenizer(texts(), vocab_size)
        if tokenizer.get_vocab_size() < vocab_size:
            raise DataError(
                f"too small a corpus: its {size:,} bytes give {tokenizer.get_vocab_size():,} "
                f"of {vocab_size:,} tokens; give more text or a smaller --vocab-size"
            )
        return tokenizer

    def write(
        self, split: str, folder: Path, tokenizer: Tokenizer, on_bytes: Step | None = None, copies: int = 0
    ) -> ShardWriter:
        """Tokenise one split into its shard; the closed writer has the counts.

        Behind all stories come up to `copies` renamed ones of each, counted in `renamed`.
        """
        with ShardWriter(folder, split) as writer:

            def add(stories: list[Renamed]) -> None:
                encodings = tokenizer.encode_batch([story.text for story in stories], add_special_tokens=False)
                for story, encoding in zip(stories, encodings, strict=True):
                    writer.add(encoding.ids, story.masked(encoding.offsets))

            for batch in _batches(self._texts(split)):
                add([Renamed(text, {}, ()) for text in batch])
                if on_bytes:
                    on_bytes(sum(len(text.encode()) for text in batch))
            if copies:
                renamer = Renamer(self._texts(split), seed=self._seed)
                for text in self._texts(split):
                    add(list(renamer.copies(text, story=story_id(text), count=copies)))
                    if on_bytes:
                        on_bytes(copies * len(text.encode()))
                self.renamed = renamer.counts
        return writer


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts of about a megabyte, so that memory does not hang on the stories' length."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class StorySpool:
    """An append-only file of texts with random access by number; the caller deletes the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=1024 * 1024)
        self._ends = array("q", [0])
        self._flushed = True

    def append(self, text: str) -> None:
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        self._flushed = False

    def sizes(self) -> NDArray[np.int64]:
        ends = np.array(self._ends, np.int64)
        return ends[1:] - ends[:-1]

    def __getitem__(self, number: int) -> str:
        if not self._flushed:
            self._file.flush()
            self._flushed = True
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start).decode()

    def close(self) -> None:
        self._file.close()
