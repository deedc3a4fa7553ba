"""The tokenizer: byte-level BPE (Radford et al. 2019, section 2.2), so that no text is unknown.

4,096 tokens keep the tied embedding at a fifth of a 5 M-parameter model; a token covers about four bytes.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.architecture.config import END_ID
from model.errors import DataError

END_OF_STORY = "<|endoftext|>"
MAX_VOCAB = 1 << 16
"""Token ids are kept in 16 bits."""

_PROBE = "Once upon a time, Zoë said: \"It's 5 o'clock!\"\n\u65e5\u672c \U0001f409  <b>\x00\t"


def train_tokenizer(stories: Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens; id 0 is the end of a story.

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
