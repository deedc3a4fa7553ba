"""Token shards of our own stories, made once a test session for whoever trains on them."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, prepare


@cache
def own_shards() -> Path:
    """As `story data` makes them, with a tokenizer of 512 tokens; to be read only."""
    folder = Path(tempfile.mkdtemp(prefix="shards-", dir=Path.home())) / "own"
    prepare(PrepareOptions(sources=(own_stories_folder(),), out=folder, vocab_size=512))
    return folder
