"""Token shards of our own stories, made once a run of the tests for whoever trains on them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.once import once_a_run, shared_folder
from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, prepare


@once_a_run
def own_shards() -> Path:
    """As `story data` makes them, with a tokenizer of 512 tokens; to be read only."""
    folder = Path(tempfile.mkdtemp(prefix="shards-", dir=shared_folder())) / "own"
    prepare(PrepareOptions(sources=(own_stories_folder(),), out=folder, vocab_size=512))
    return folder
