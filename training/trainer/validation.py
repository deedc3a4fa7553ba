"""Validation during training: bits per byte on held-out stories, and sample stories.

Each story is read from its start, as in serving. Figures are exact sums over all targets, ends included, in fp32.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.architecture.config import END_ID
from model.architecture.network import StoryNetwork
from model.errors import DataError
from training.data.shards import TokenShard
from training.trainer.parallel import Group
from training.trainer.rows import IGNORED, batches_by_length

BATCH_TOKENS = 4096
SAMPLE_TEMPERATURE = 0.7


class Validation:
    """The first `stories` of a validation shard (0: all), sorted by length into batches of little padding.

    Raises `DataError` for a shard without stories.
    """

    def __init__(self, shard: TokenShard, tokenizer: Tokenizer, stories: int, group: Group) -> None:
        if len(shard) == 0:
            raise DataError(f"the {shard.split} shard holds no stories; `story data` makes one that does")
        self.stories = count = min(stories, len(shard)) if stories else len(shard)
        texts = tokenizer.decode_batch([shard.story(index)[1:].tolist() for index in range(count)])
        self.bytes = sum(len(text.encode()) for text in texts)
        self.tokens = int(shard.starts[count])
        self.shard, self.group = shard, group
        self._batches = batches_by_length(np.diff(shard.starts[: count + 1]).tolist(), BATCH_TOKENS)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the stories: (inputs, targets), both (B, T), padded by what does not count."""
        for batch in self._batches[self.group.rank :: self.group.size]:
            inputs, targets = self._padded(batch)
            yield torch.from_numpy(inputs), torch.from_numpy(targets)

    @torch.no_grad()
    def measure(self, network: StoryNetwork) -> tuple[float, float]:
        """(mean nats a token, bits per byte); each process takes its share of the batches."""
        device = network.embedding.weight.device
        nats = torch.zeros(1, dtype=torch.float64)
        for inputs_BT, targets_BT in self.batches():
            nats += float(network.loss_sum(inputs_BT.to(device), targets_BT.to(device)))
        total = float(self.group.sum(nats))
        return total / self.tokens, total / math.log(2) / self.bytes

    def _padded(self, batch: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts = self.shard.starts
        width = max(int(starts[story + 1] - starts[story]) for story in batch)
        inputs = np.full((len(batch), width), END_ID, np.int64)
        targets = np.full((len(batch), width), IGNORED, np.int64)
        for row, story in enumerate(batch):
            both = self.shard.tokens[starts[story] : starts[story + 1] + 1].astype(np.int64)
            inputs[row, : len(both) - 1], targets[row, : len(both) - 1] = both[:-1], both[1:]
        return inputs, targets


@torch.no_grad()
def write_samples(
    network: StoryNetwork, tokenizer: Tokenizer, prompts: tuple[str, ...], *, seed: int, max_tokens: int = 160
) -> tuple[tuple[str, str], ...]:
    """Continue each prompt at temperature 0.7 by the network's step form: (prompt, continuation) pairs.

    All are generated as one batch, each with its own generator.
    """
    device = network.embedding.weight.device
    streams = [[END_ID, *tokenizer.encode(prompt).ids] for prompt in prompts]
    given = [len(stream) for stream in streams]
    rng = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    state = network.initial_state(len(prompts))
    unfinished, position = set(range(len(prompts))) if max_tokens > 0 else set(), 0
    while unfinished:
        # A stream that has ended is fed ends of story; nobody looks at what comes of it.
        tokens = [stream[position] if position < len(stream) else END_ID for stream in streams]
        logits_BV, state = network.step(torch.tensor(tokens, device=device), state)
        position += 1
        for index in [index for index in unfinished if len(streams[index]) == position]:
            chances_V = (logits_BV[index].float().cpu() / SAMPLE_TEMPERATURE).softmax(0)
            token = int(torch.multinomial(chances_V, 1, generator=rng[index]))
            if token != END_ID:
                streams[index].append(token)
            if token == END_ID or len(streams[index]) - given[index] == max_tokens:
                unfinished.remove(index)
    written = [stream[length:] for stream, length in zip(streams, given, strict=True)]
    return tuple(zip(prompts, tokenizer.decode_batch(written), strict=True))
