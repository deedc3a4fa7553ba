"""Rows of training against a plain enumeration of the shard, token by token; validation against single stories."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

import training.trainer.rows
from model.architecture.network import NetworkState, StoryNetwork
from model.errors import DataError
from tests.training.runs import MODEL
from training.data.shards import ShardWriter, TokenShard
from training.trainer.parallel import Group
from training.trainer.rows import BATCH_TOKENS, IGNORED, Row, RowStream, Validation, write_samples

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


@pytest.fixture(scope="module")
def network() -> StoryNetwork:
    """Not a fresh one, whose output projections are all zero: every layer has a say."""
    torch.manual_seed(1)
    network = StoryNetwork(MODEL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def tokenizer(shards: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shards / "tokenizer.json"))


def short_stories(shards: Path, folder: Path, tokenizer: Tokenizer) -> tuple[TokenShard, list[str]]:
    """The beginnings of our own held-out stories, of many lengths; and their texts."""
    shard = TokenShard(shards, "val")
    texts = []
    with ShardWriter(folder, "val") as writer:
        for index in range(12):
            tokens = shard.story(index)[1 : 2 + 7 * ((index * 5) % 12)].tolist()
            writer.add(tokens)
            texts.append(tokenizer.decode(tokens))
    return TokenShard(folder, "val"), texts


@torch.no_grad()
def story_by_story(network: StoryNetwork, shard: TokenShard, count: int) -> tuple[float, int]:
    """Nats and targets of the first stories, one token after another through the form that serves."""
    nats, targets = 0.0, 0
    for index in range(count):
        state = network.initial_state(1)
        tokens = [*shard.story(index).tolist(), 0]
        for token, following in pairwise(tokens):
            logits_1V, state = network.step(torch.tensor([token]), state)
            nats -= float(logits_1V[0].double().log_softmax(0)[following])
            targets += 1
    return nats, targets


@pytest.mark.parametrize("count", [1, 5, 0])
def test_the_figures_are_those_of_reading_each_story_alone_token_by_token(
    network: StoryNetwork, shards: Path, tokenizer: Tokenizer, tmp_path: Path, count: int
) -> None:
    shard, texts = short_stories(shards, tmp_path, tokenizer)
    loss, bits_per_byte = Validation(shard, tokenizer, count, Group()).measure(network)
    nats, targets = story_by_story(network, shard, count or len(shard))
    size = sum(len(text.encode()) for text in texts[: count or len(shard)])
    assert loss == pytest.approx(nats / targets, rel=1e-5)
    assert bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_bytes_are_utf_8_and_not_characters(network: StoryNetwork, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "Ünal rief: „Häschen!“ 🐇"
    with ShardWriter(tmp_path, "val") as writer:
        writer.add(tokenizer.encode(text).ids)
    validation = Validation(TokenShard(tmp_path, "val"), tokenizer, 0, Group())
    loss, bits_per_byte = validation.measure(network)
    tokens = len(tokenizer.encode(text).ids) + 1
    assert bits_per_byte == pytest.approx(loss * tokens / math.log(2) / len(text.encode()))
    assert len(text.encode()) > len(text)


def test_batches_hold_each_story_once_little_padding_and_no_more_than_their_bound(
    shards: Path, tokenizer: Tokenizer
) -> None:
    shard = TokenShard(shards, "val")
    validation = Validation(shard, tokenizer, 0, Group())
    assert sorted(story for batch in validation._batches for story in batch) == list(range(len(shard)))
    lengths = np.diff(shard.starts)
    places = [len(batch) * int(lengths[batch].max()) for batch in validation._batches]
    assert all(size <= BATCH_TOKENS or len(batch) == 1 for size, batch in zip(places, validation._batches, strict=True))
    assert sum(places) < 1.25 * int(lengths.sum())


def test_what_stands_in_the_padding_changes_nothing(
    network: StoryNetwork, shards: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, _ = short_stories(shards, tmp_path, tokenizer)
    validation = Validation(shard, tokenizer, 0, Group())
    expected = validation.measure(network)
    padded = validation._padded
    seen = 0

    def scribbled(batch: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        nonlocal seen
        inputs, targets = padded(batch)
        seen += int((targets == IGNORED).sum())
        inputs[targets == IGNORED] = 300
        return inputs, targets

    monkeypatch.setattr(validation, "_padded", scribbled)
    assert validation.measure(network) == pytest.approx(expected, rel=1e-6)
    assert seen > 0


def test_the_shares_of_two_processes_are_the_whole(
    network: StoryNetwork, shards: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Half(Group):
        """One of two processes, whose sum is taken by the test; the real exchange is in test_parallel."""

        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, 2

        def sum(self, value: Tensor) -> Tensor:
            return value

    shard = TokenShard(shards, "val")
    whole = Validation(shard, tokenizer, 6, Group()).measure(network)
    monkeypatch.setattr("training.trainer.rows.BATCH_TOKENS", 512)
    halves = [Validation(shard, tokenizer, 6, Half(rank)).measure(network) for rank in (0, 1)]
    assert sum(half[0] for half in halves) == pytest.approx(whole[0], rel=1e-6)
    assert min(half[0] for half in halves) > 0


def test_a_validation_shard_without_stories_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "val"):
        pass
    with pytest.raises(DataError, match="the val shard holds no stories"):
        Validation(TokenShard(tmp_path, "val"), tokenizer, 0, Group())


PROMPTS = ("Once upon a time", "", "The cat sat on the mat and looked at the rain.")


def test_samples_are_the_same_for_the_same_seed_and_others_for_another(
    network: StoryNetwork, tokenizer: Tokenizer
) -> None:
    first, again, other = (write_samples(network, tokenizer, PROMPTS, seed=seed, max_tokens=20) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert tuple(prompt for prompt, _ in first) == PROMPTS


def test_a_sample_does_not_depend_on_the_others(network: StoryNetwork, tokenizer: Tokenizer) -> None:
    together = write_samples(network, tokenizer, PROMPTS, seed=3, max_tokens=20)
    for index, prompt in enumerate(PROMPTS):
        alone = write_samples(network, tokenizer, (prompt,), seed=3 + index, max_tokens=20)
        assert alone == together[index : index + 1]


def test_a_sample_ends_where_the_network_ends_it_or_at_its_length(
    network: StoryNetwork, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An untrained network does not know when to end, so the logit of the end is set from here.
    step, calls = network.step, 0
    prompt = [0, *tokenizer.encode(PROMPTS[0]).ids]

    def ends_after_four(tokens_B: Tensor, state: NetworkState) -> tuple[Tensor, NetworkState]:
        nonlocal calls
        logits_BV, state = step(tokens_B, state)
        logits_BV[:, 0] = 1e4 if calls == len(prompt) - 1 + 4 else -1e4
        calls += 1
        return logits_BV, state

    monkeypatch.setattr(network, "step", ends_after_four)
    ((_, ended),) = write_samples(network, tokenizer, PROMPTS[:1], seed=0, max_tokens=50)
    assert calls == len(prompt) + 4
    calls = 0
    ((_, cut),) = write_samples(network, tokenizer, PROMPTS[:1], seed=0, max_tokens=3)
    assert calls == len(prompt) + 2, "the third token is the last one that is asked for"
    assert cut
    assert ended.startswith(cut)


def test_no_prompts_are_no_samples(network: StoryNetwork, tokenizer: Tokenizer) -> None:
    assert write_samples(network, tokenizer, (), seed=0) == ()
