"""What training drops of the network, and that nobody else ever does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.architecture.config import ModelConfig
from model.architecture.network import StoryNetwork
from tests.model.small_model import random_network

TINY = ModelConfig(
    vocab_size=30, width=16, pattern="RA", mlp_width=24, heads=2, head_dim=8, key_dim=4, window=12, chunk=16
)  # fmt: skip
TOKENS_BT = torch.randint(1, TINY.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))


def pair(dropout: float) -> tuple[StoryNetwork, StoryNetwork]:
    """The same weights without and with dropout, both in training mode."""
    plain = random_network(TINY)
    dropping = StoryNetwork(TINY, dropout=dropout)
    dropping.load_state_dict(plain.state_dict())
    return plain.train(), dropping.train()


def logits(network: StoryNetwork, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(TOKENS_BT)  # type: ignore[no-any-return]


def test_training_drops_by_the_dice() -> None:
    plain, dropping = pair(0.3)
    first = logits(dropping)
    assert not torch.allclose(first, logits(plain), atol=0.1)
    assert not torch.allclose(first, logits(dropping, seed=1), atol=0.1)
    assert torch.equal(first, logits(dropping))


def test_evaluation_and_the_step_form_drop_nothing() -> None:
    plain, dropping = pair(0.9)
    state = dropping.initial_state(len(TOKENS_BT))
    with torch.no_grad():
        for time in range(TOKENS_BT.size(1)):
            # Even one that was left in training mode.
            step_BV, state = dropping.step(TOKENS_BT[:, time], state)
            torch.testing.assert_close(step_BV, logits(plain)[:, time], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(dropping.eval()), logits(plain))


def test_a_share_of_zero_drops_nothing_bit_for_bit() -> None:
    plain, dropping = pair(0.0)
    assert torch.equal(logits(dropping), logits(plain))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_that_of_the_values_and_the_others_make_up_for_it(share: float) -> None:
    dropping = StoryNetwork(TINY, dropout=share).train()
    values = torch.ones(200, 200)
    for drop in [dropping.dropout, *(block.dropout for block in dropping.blocks)]:
        torch.manual_seed(0)
        left = drop(values)  # type: ignore[operator]
        assert float((left == 0).float().mean()) == pytest.approx(share, abs=0.02)
        assert float(left.mean()) == pytest.approx(1.0, abs=0.02)


def test_a_block_that_drops_all_leaves_the_stream_as_it_is() -> None:
    plain, dropping = pair(0.0)
    for block in dropping.blocks:
        block.dropout.p = 1.0  # type: ignore[union-attr]
    assert not torch.allclose(logits(dropping), logits(plain), atol=0.1)
    empty = StoryNetwork(TINY)  # a new network's branches give zero
    with torch.no_grad():
        empty.embedding.weight.copy_(plain.embedding.weight)
    assert torch.equal(logits(dropping), logits(empty))
