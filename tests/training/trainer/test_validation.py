from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.architecture.network import NetworkState, StoryNetwork
from model.errors import DataError
from tests.training.runs import MODEL
from training.data.shards import ShardWriter, TokenShard
from training.trainer.parallel import Group
from training.trainer.rows import BATCH_TOKENS, IGNORED, Validation, write_samples


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


def test_a_shard_without_stories_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
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
