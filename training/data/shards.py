"""The tokenizer, and stories as tokens on disk, read by memory map: a run starts at once, processes share one copy.

A folder holds `tokenizer.json`, `meta.json` and for each split `SPLIT.bin` (uint16, little endian: every story is the
end-of-story id 0 followed by its tokens; one last 0 closes the file) and `SPLIT.idx.npy` (int64: where each story's 0
stands, and last the place of the closing 0). `SPLIT.masked.npy` (int64, ascending), where it exists, lists the places
of tokens that a model reads but is not trained to predict. So `tokens[a : b + 1]` with a, b two neighbouring entries
is a story with both its marks, and inputs and targets are the same array shifted by one.
"""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.architecture.folder import END_ID
from model.errors import DataError

END_OF_STORY = "<|endoftext|>"
MAX_VOCAB = 1 << 16
"""Token ids are kept in 16 bits."""

_PROBE = "Once upon a time, Zoë said: \"It's 5 o'clock!\"\n\u65e5\u672c \U0001f409  <b>\x00\t"


def train_tokenizer(stories: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019, section 2.2) of `vocab_size` tokens; id 0 is the end of a story.

    4,096 tokens keep the tied embedding at a fifth of a 5 M-parameter model; a token covers about four bytes.

    Memory grows with the number of different words, not with the length of the text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_STORY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer=trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` and make sure that it keeps the project's conventions.

    Raises:
        DataError: it cannot be read, its id 0 is not `<|endoftext|>`, it has more than 65,536 tokens, or it does not
            give every text back (so it is not byte-level).
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library raises bare Exception for a text that it cannot parse
        raise DataError(f"{path}: is not a tokenizer.json: {error}") from error
    found = tokenizer.token_to_id(END_OF_STORY)
    if found != END_ID:
        what = "is missing" if found is None else f"has the id {found}"
        raise DataError(f"{path}: {END_OF_STORY} must have the id {END_ID}, but it {what}")
    if tokenizer.get_vocab_size() > MAX_VOCAB:
        raise DataError(f"{path}: has {tokenizer.get_vocab_size():,} tokens; at most {MAX_VOCAB:,} are allowed")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids) != _PROBE:
        raise DataError(f"{path}: does not give every text back; it must be a byte-level tokenizer")
    return tokenizer


def same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two `tokenizer.json` encode alike. Raises `DataError` where one cannot be read."""
    return bool(load_tokenizer(one).to_str() == load_tokenizer(other).to_str())


SPLITS = ("train", "val")
TOKEN_DTYPE = np.dtype("<u2")


class ShardWriter:
    """Writes one split; use as a context manager, which closes the last story and writes the index."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._file = (folder / f"{split}.bin").open("wb", buffering=1024 * 1024)
        self._starts, self._masked = array("q"), array("q")
        self._offset = 0

    @property
    def tokens(self) -> int:
        """Prediction targets so far: every token, and one end for every story."""
        return self._offset

    @property
    def stories(self) -> int:
        return len(self._starts)

    def add(self, tokens: Sequence[int], masked: Iterable[int] = ()) -> None:
        """Append one story, given without its marks; no id may be 0 (the end) or 65,536 and more.

        `masked` are the places in `tokens`, in ascending order, that are no targets.
        """
        if tokens and (min(tokens) <= END_ID or max(tokens) >= MAX_VOCAB):
            raise DataError(f"{self._split} story {self.stories}: token ids must be between 1 and {MAX_VOCAB - 1}")
        self._starts.append(self._offset)
        self._masked.extend(self._offset + 1 + place for place in masked)
        self._file.write(np.array([END_ID, *tokens], TOKEN_DTYPE).tobytes())
        self._offset += 1 + len(tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.write(np.array([END_ID], TOKEN_DTYPE).tobytes())
        if kind is None:
            starts = np.array([*self._starts, self._offset], np.int64)
            np.save(self._folder / f"{self._split}.idx.npy", starts, allow_pickle=False)
            if self._masked:
                masked = np.array(self._masked, np.int64)
                np.save(self._folder / f"{self._split}.masked.npy", masked, allow_pickle=False)


class TokenShard:
    """One split, memory-mapped: `tokens` (uint16), `starts` (int64, one entry more than there are stories) and
    `masked` (int64, places in `tokens`).
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Open `folder`/`split`.bin and its index.

        Raises:
            DataError: a file is missing, or the index does not fit the tokens.
        """
        bin_path, idx_path = folder / f"{split}.bin", folder / f"{split}.idx.npy"
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path}: no such file; `story data` makes it")
        starts = _load_index(idx_path)
        entries = bin_path.stat().st_size / TOKEN_DTYPE.itemsize
        if starts.dtype != np.int64 or starts.ndim != 1 or len(starts) == 0 or starts[0] != 0:
            raise DataError(f"{idx_path}: must be a row of int64 that begins with 0, got {starts.dtype} {starts.shape}")
        if entries != starts[-1] + 1 or (np.diff(starts) < 1).any():
            raise DataError(f"{bin_path}: holds {entries:g} tokens where its index speaks of {starts[-1] + 1}")
        self.split = split
        self.starts = starts
        masked = folder / f"{split}.masked.npy"
        self.masked = _load_index(masked) if masked.is_file() else np.empty(0, np.int64)
        self.tokens: np.memmap[Any, np.dtype[np.uint16]] = np.memmap(bin_path, TOKEN_DTYPE, "r")
        if (self.tokens[starts] != END_ID).any():
            raise DataError(f"{bin_path}: a story does not begin with token {END_ID} where the index says so")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def story(self, i: int) -> NDArray[np.uint16]:
        """Story i (0 ≤ i < len) with its leading 0 and without the 0 behind it: a view, nothing is copied."""
        if not 0 <= i < len(self):
            raise IndexError(f"story must be between 0 and {len(self) - 1}, got {i}")
        return self.tokens[self.starts[i] : self.starts[i + 1]]


def _load_index(path: Path) -> NDArray[np.int64]:
    try:
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: damaged index: {error}") from error


def shards_digest(folder: Path) -> str:
    """SHA-256 (hex) over `tokenizer.json`, both splits' tokens and, where there are any, their masked places.

    That is all that a training sees of a corpus; `SPLIT.idx.npy` follows from the tokens.
    """
    digest = hashlib.sha256()
    masks = [name for name in (f"{split}.masked.npy" for split in SPLITS) if (folder / name).is_file()]
    for name in ("tokenizer.json", *(f"{split}.bin" for split in SPLITS), *masks):
        if name in masks:
            digest.update(name.encode())  # the same places in the other split are other data
        try:
            with (folder / name).open("rb") as file:
                while block := file.read(1024 * 1024):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{folder / name}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """The folder's `meta.json`.

    Raises:
        DataError: it is missing or is not a JSON object.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read; `story data` makes it") from error
    except ValueError as error:
        raise DataError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return meta


def batches_by_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indexes of sequences of like length, so that padding is small: at most `most` places, or one sequence."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= most:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
