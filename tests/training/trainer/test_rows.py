"""The rows of training against a plain enumeration of the shard, token by token."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training.trainer.rows
from model.errors import DataError
from training.data.shards import ShardWriter, TokenShard
from training.trainer.rows import IGNORED, Row, RowStream

EXAMPLES = settings(max_examples=30)
"""Each writes a shard of its own to the disk."""
LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=40)


def write_shard(folder: Path, lengths: list[int]) -> TokenShard:
    """Stories of these lengths in which no token occurs twice, so that each one can be notes apart."""
    with ShardWriter(folder, "train") as writer:
        first = 1
        for length in lengths:
            writer.add(range(first, first + length))
            first += length
    return TokenShard(folder, "train")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 stories instead of 4096, so that a small shard has many block borders."""
    monkeypatch.setattr(training.trainer.rows, "BLOCK", 7)


def one_epoch(shard: TokenShard, row_tokens: int, seed: int = 0, epoch: int = 0) -> list[Row]:
    stream = RowStream(shard, row_tokens, seed)
    rows: list[Row] = []
    while True:
        row = next(stream)
        if stream.epoch > epoch:
            return rows
        if stream.epoch == epoch:
            rows.append(row)


def predictions(rows: list[Row]) -> Counter[tuple[int, int]]:
    """All (input, target) pairs that count."""
    pairs: Counter[tuple[int, int]] = Counter()
    for inputs, targets in rows:
        counted = targets != IGNORED
        pairs.update(zip(inputs[counted].tolist(), targets[counted].tolist(), strict=True))
    return pairs


def expected_predictions(lengths: list[int]) -> Counter[tuple[int, int]]:
    """The same from the lengths alone: each story is 0, its tokens, 0, and each neighbour predicts the next."""
    pairs: Counter[tuple[int, int]] = Counter()
    first = 1
    for length in lengths:
        pairs.update(pairwise([0, *range(first, first + length), 0]))
        first += length
    return pairs


@pytest.mark.usefixtures("small_blocks")
class TestWhateverTheStories:
    @EXAMPLES
    @given(lengths=LENGTHS, row_tokens=st.integers(8, 48), seed=st.integers(0, 9), epoch=st.integers(0, 2))
    def test_every_token_is_a_target_exactly_once_in_an_epoch(
        self, lengths: list[int], row_tokens: int, seed: int, epoch: int
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows = one_epoch(write_shard(Path(folder), lengths), row_tokens, seed, epoch)
            assert predictions(rows) == expected_predictions(lengths)

    @EXAMPLES
    @given(lengths=LENGTHS, row_tokens=st.integers(8, 48), seed=st.integers(0, 9))
    def test_nothing_is_read_as_the_continuation_of_another_story(
        self, lengths: list[int], row_tokens: int, seed: int
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for inputs, targets in one_epoch(write_shard(Path(folder), lengths), row_tokens, seed):
                filled = int((targets != IGNORED).sum())
                assert (targets[filled:] == IGNORED).all(), "empty places stand at the end of a row"
                assert (inputs[filled:] == 0).all(), "and what stands there reads no story"
                for before, target, after in zip(inputs, targets, inputs[1:filled], strict=False):
                    # Within a row an input is the target before it: a story goes on, or its end has come and
                    # the next input is the 0 at which the network forgets.
                    assert after == target, (before, target, after)

    @EXAMPLES
    @given(lengths=LENGTHS, row_tokens=st.integers(8, 48), seed=st.integers(0, 9))
    def test_only_the_rest_of_a_story_longer_than_a_row_begins_without_the_mark_of_a_story(
        self, lengths: list[int], row_tokens: int, seed: int
    ) -> None:
        firsts, first = set(), 1
        for length in lengths:
            # The mark is a story's place 0, so its token number n is the piece's first at place n + 1.
            firsts |= {first + place - 1 for place in range(row_tokens, length + 1, row_tokens)}
            first += length
        with tempfile.TemporaryDirectory() as folder:
            rows = one_epoch(write_shard(Path(folder), lengths), row_tokens, seed)
        assert {int(inputs[0]) for inputs, _ in rows} - {0} == firsts

    @EXAMPLES
    @given(lengths=LENGTHS, row_tokens=st.integers(8, 48), taken=st.integers(0, 150), detour=st.integers(0, 150))
    def test_a_stream_goes_on_exactly_where_a_state_was_taken(
        self, lengths: list[int], row_tokens: int, taken: int, detour: int
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            shard = write_shard(Path(folder), lengths)
            whole = RowStream(shard, row_tokens, 3)
            for _ in islice(whole, taken):
                pass
            state = whole.state()
            resumed = RowStream(shard, row_tokens, 3)
            for _ in islice(resumed, detour):  # wherever it stood before
                pass
            resumed.seek(state)
            for expected, got in zip(islice(whole, 60), resumed, strict=False):
                assert (np.array(expected) == np.array(got)).all()
            assert whole.state() == resumed.state()


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [20] * 30)
    first, again, other = (np.array(one_epoch(shard, 32, seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not np.array_equal(first, other)


def test_each_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [20] * 30)
    first, second = (np.array(one_epoch(shard, 32, epoch=epoch)) for epoch in (0, 1))
    assert not np.array_equal(first, second)


def test_rows_of_whole_stories_leave_few_places_empty(tmp_path: Path) -> None:
    # Lengths like those of TinyStories: mean about 210 tokens, few above 512.
    lengths = np.random.default_rng(0).gamma(6, 35, 2000).astype(int).tolist()
    lengths = [max(20, min(length, 700)) for length in lengths]
    with ShardWriter(tmp_path, "train") as writer:
        for length in lengths:
            writer.add([1] * length)
    rows = one_epoch(TokenShard(tmp_path, "train"), 512)
    empty = np.mean([(targets == IGNORED).mean() for _, targets in rows])
    assert empty < 0.05
    fewest = -(-sum(length + 1 for length in lengths) // 512)
    assert len(rows) < fewest * 1.05


def test_a_real_shard_is_read_whole(shards: Path) -> None:
    shard = TokenShard(shards, "train")
    expected: Counter[tuple[int, int]] = Counter()
    for index in range(len(shard)):
        expected.update(pairwise([*shard.story(index).tolist(), 0]))
    assert predictions(one_epoch(shard, 128)) == expected


def test_a_shard_without_stories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the train shard holds no stories"):
        RowStream(write_shard(tmp_path, []), 64, 0)
