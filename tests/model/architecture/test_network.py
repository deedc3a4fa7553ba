"""The two forms of the network against each other, and both against what they promise.

Shapes: B batch, T time, D width, V vocabulary, H heads, N keys a head, P values a head, M convolved channels.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.architecture.folder import END_ID, PRETRAINED, ModelConfig, ModelFolder
from model.architecture.network import (
    AttentionState,
    NetworkState,
    Recurrence,
    RecurrentState,
    StoryNetwork,
    rms_norm,
    rotate,
)
from tests.model.small_model import random_network, small_checkpoint
from training.trainer.recipe import load_recipe

CHUNK = 16
TINY = ModelConfig(
    vocab_size=30, width=16, pattern="RRA", mlp_width=24, heads=2, head_dim=8, key_dim=4, window=12, chunk=CHUNK
)
PATTERNS = ("R", "A", "RRA", "AAA", "RRR")
TOLERANCE = 1e-4


@cache
def network_of(pattern: str, chunk: int = CHUNK) -> StoryNetwork:
    """Random in every parameter; the same weights for each chunk size."""
    return random_network(dataclasses.replace(TINY, pattern=pattern, chunk=chunk))


@torch.no_grad()
def by_steps(network: StoryNetwork, tokens_BT: Tensor, state: NetworkState | None = None) -> Tensor:
    """Logits (B, T, V), one token at a time."""
    state = network.initial_state(len(tokens_BT)) if state is None else state
    logits = []
    for time in range(tokens_BT.size(1)):
        logits_BV, state = network.step(tokens_BT[:, time], state)
        logits.append(logits_BV)
    return torch.stack(logits, dim=1)


@torch.no_grad()
def whole(network: StoryNetwork, tokens_BT: Tensor) -> Tensor:
    return network(tokens_BT)  # type: ignore[no-any-return]


def random_rows(batch: int, time: int, seed: int) -> Tensor:
    """(B, T) tokens without any story border."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(1, TINY.vocab_size, (batch, time)))


@st.composite
def rows(draw: st.DrawFn, longest: int = 200, chunks: tuple[int, ...] = (CHUNK,)) -> Tensor:
    """(B, T) tokens; borders anywhere, and often beside each other and on the borders of chunks."""
    batch, time = draw(st.integers(1, 4)), draw(st.integers(1, longest))
    tokens_BT = random_rows(batch, time, draw(st.integers(0, 2**32 - 1)))
    near_chunks = st.builds(
        lambda chunk, index, by: chunk * index + by, st.sampled_from(chunks), st.integers(0, 12), st.integers(-2, 2)
    )
    for row in range(batch):
        places = draw(st.sets(st.one_of(near_chunks, st.integers(0, longest)), max_size=8))
        if draw(st.booleans()):
            places |= {place + 1 for place in places}  # stories of no token at all
        for place in places:
            if 0 <= place < time:
                tokens_BT[row, place] = END_ID
    return tokens_BT


@pytest.mark.parametrize("pattern", PATTERNS)
@given(tokens_BT=rows())
@settings(max_examples=8)
def test_whole_rows_and_single_steps_give_the_same_logits(pattern: str, tokens_BT: Tensor) -> None:
    network = network_of(pattern)
    torch.testing.assert_close(whole(network, tokens_BT), by_steps(network, tokens_BT), rtol=TOLERANCE, atol=TOLERANCE)


def test_both_forms_agree_on_trained_weights_too() -> None:
    from model.architecture.network import load_network

    network = load_network(small_checkpoint())
    rng = np.random.default_rng(3)
    tokens_BT = torch.from_numpy(rng.integers(1, network.config.vocab_size, (3, 100)))
    tokens_BT[:, 0] = tokens_BT[1, 40] = tokens_BT[2, 48] = END_ID
    torch.testing.assert_close(whole(network, tokens_BT), by_steps(network, tokens_BT), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("pattern", ["R", "RRA"])
@given(tokens_BT=rows(longest=90, chunks=(5, 7, 16)), chunk=st.integers(1, 100))
@settings(max_examples=12)
def test_the_chunk_size_changes_nothing(pattern: str, tokens_BT: Tensor, chunk: int) -> None:
    torch.testing.assert_close(
        whole(network_of(pattern, chunk), tokens_BT),
        whole(network_of(pattern, 90), tokens_BT),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@given(time=st.integers(2, 80), data=st.data())
@settings(max_examples=8)
def test_an_earlier_story_changes_no_later_logit(pattern: str, time: int, data: st.DataObject) -> None:
    border = data.draw(st.integers(1, time - 1), label="border")
    one, other = random_rows(2, time, 0), random_rows(2, time, 1)
    other[:, border:] = one[:, border:]
    one[:, border] = other[:, border] = END_ID
    if data.draw(st.booleans(), label="another border before"):
        other[:, data.draw(st.integers(0, border - 1), label="its place")] = END_ID
    network = network_of(pattern)
    first, second = whole(network, one), whole(network, other)
    # Not the last bit: the decays of a chunk are summed over the border, and rounded on the way.
    torch.testing.assert_close(first[:, border:], second[:, border:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[:, :border], second[:, :border], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_step_that_starts_a_story_forgets_all_that_was(pattern: str) -> None:
    network = network_of(pattern)
    story = torch.tensor([[END_ID, 5, 6, 7, 8, 9, 10]])
    before = random_rows(1, 31, seed=5)
    after = by_steps(network, torch.cat([before, story], dim=1))[:, 31:]
    torch.testing.assert_close(after, by_steps(network, story), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@given(time=st.integers(2, 80), data=st.data())
@settings(max_examples=8)
def test_nothing_leaks_from_the_future(pattern: str, time: int, data: st.DataObject) -> None:
    until = data.draw(st.integers(1, time - 1), label="tokens that stay")
    one, other = random_rows(2, time, 2), random_rows(2, time, 3)
    other[:, :until] = one[:, :until]
    other[:, until] = (one[:, until] % (TINY.vocab_size - 1)) + 1  # surely another
    if data.draw(st.booleans(), label="a story ends then"):
        other[0, until] = END_ID
    network = network_of(pattern)
    first, second = whole(network, one), whole(network, other)
    torch.testing.assert_close(first[:, :until], second[:, :until], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[:, until:], second[:, until:], rtol=1e-2, atol=1e-2)


@given(changed=st.integers(0, 39), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_a_layer_of_attention_sees_its_window_and_not_a_token_further(changed: int, seed: int) -> None:
    network, window = network_of("A"), TINY.window
    one = random_rows(1, 40, seed)
    other = one.clone()
    other[0, changed] = (one[0, changed] % (TINY.vocab_size - 1)) + 1
    moved_T = (whole(network, one) - whole(network, other)).abs().amax(-1)[0]
    sees = torch.arange(40) - changed
    assert float(F.pad(moved_T[(sees < 0) | (sees >= window)], (0, 1)).max()) == 0.0
    assert float(moved_T[(sees >= 0) & (sees < window)].min()) > 0.0


def test_a_recurrent_layer_remembers_beyond_any_window() -> None:
    network = network_of("R")
    with torch.no_grad():
        slow = StoryNetwork(network.config)
        slow.load_state_dict(network.state_dict())
        for block in slow.blocks:
            cast(Recurrence, block.mixer).log_decay.fill_(-8.0)
    one = random_rows(1, 100, 0)
    other = one.clone()
    other[0, 0] = one[0, 0] % (TINY.vocab_size - 1) + 1
    assert float((whole(slow, one) - whole(slow, other))[0, -1].abs().max()) > 1e-4


def nbytes(state: NetworkState) -> int:
    return sum(part.element_size() * part.nelement() for layer in state.layers for part in layer)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_state_has_the_same_size_at_every_token(pattern: str) -> None:
    network = network_of(pattern)
    state = network.initial_state(3)
    kinds = {"R": RecurrentState, "A": AttentionState}
    assert [type(layer) for layer in state.layers] == [kinds[letter] for letter in pattern]
    shapes = [[part.shape for part in layer] for layer in state.layers]
    size = nbytes(state)
    with torch.no_grad():
        for token in range(1, 30):
            _, state = network.step(torch.tensor([token, 1, 0]), state)
            assert [[part.shape for part in layer] for layer in state.layers] == shapes
            assert nbytes(state) == size
    assert state.position_B.tolist() == [29, 29, 29]


def test_a_step_leaves_the_state_that_it_was_given_as_it_was() -> None:
    network = network_of("RRA")
    with torch.no_grad():
        _, state = network.step(torch.tensor([4, 5]), network.initial_state(2))
        before = [part.clone() for layer in state.layers for part in layer]
        one, _ = network.step(torch.tensor([6, 7]), state)
        again, _ = network.step(torch.tensor([6, 7]), state)
    assert all(torch.equal(*pair) for pair in zip(before, (p for layer in state.layers for p in layer), strict=True))
    assert torch.equal(one, again)


Array = npt.NDArray[np.float64]


def loop_of_the_recurrence(
    query: Array, key: Array, value: Array, log_decay: Array, story: npt.NDArray[np.int64]
) -> Array:
    """The recurrence as it is written in a textbook: one stream, one head, one token after another."""
    read = np.zeros_like(value)
    batch, time, heads, _ = query.shape
    for b in range(batch):
        for h in range(heads):
            memory = np.zeros((key.shape[-1], value.shape[-1]))
            for t in range(time):
                if t and story[b, t] != story[b, t - 1]:
                    memory[:] = 0.0
                memory = np.exp(log_decay[b, t, h]) * memory + np.outer(key[b, t, h], value[b, t, h])
                read[b, t, h] = query[b, t, h] @ memory
    return read


@given(
    time=st.integers(1, 60),
    chunk=st.integers(1, 70),
    fastest=st.sampled_from([0.0, 0.1, 3.0, 60.0]),
    borders=st.sets(st.integers(0, 59), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_the_scan_is_the_loop_that_it_stands_for(
    time: int, chunk: int, fastest: float, borders: set[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    query, key = rng.standard_normal((2, 2, time, 2, 4))
    value = rng.standard_normal((2, time, 2, 8))
    log_decay = -fastest * rng.random((2, time, 2))  # from "forgets nothing" to "forgets at once"
    story = np.zeros((2, time), np.int64)
    story[1] = np.isin(np.arange(time), list(borders)).cumsum()
    mixer = network_of("R", chunk).blocks[0].mixer
    assert isinstance(mixer, Recurrence)
    q, k, v, decay = (torch.from_numpy(part).float() for part in (query, key, value, log_decay))
    read = mixer._scan(q, k, v, decay, torch.from_numpy(story))
    expected = loop_of_the_recurrence(query, key, value, log_decay, story)
    np.testing.assert_allclose(read.numpy(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@given(time=st.integers(1, 20), borders=st.sets(st.integers(0, 19), max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_the_convolution_is_the_loop_that_it_stands_for(time: int, borders: set[int], seed: int) -> None:
    mixer = network_of("R").blocks[0].mixer
    assert isinstance(mixer, Recurrence)
    taps_KM = mixer.conv.detach().numpy().astype(np.float64)
    mixed_TM = np.random.default_rng(seed).standard_normal((time, taps_KM.shape[1]))
    story = np.isin(np.arange(time), list(borders)).cumsum()
    expected = np.zeros_like(mixed_TM)
    for t in range(time):
        for back in range(len(taps_KM)):
            if t >= back and story[t - back] == story[t]:
                expected[t] += taps_KM[-1 - back] * mixed_TM[t - back]
    with torch.no_grad():
        result = mixer._convolve(torch.from_numpy(mixed_TM).float()[None], torch.from_numpy(story)[None])[0]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [-60.0, 25.0, 200.0])
def test_gates_at_their_ends_give_finite_logits_and_gradients(rate: float) -> None:
    network = random_network(dataclasses.replace(TINY, chunk=64), seed=1)
    with torch.no_grad():
        for block in network.blocks:
            if isinstance(block.mixer, Recurrence):
                block.mixer.rate.bias.fill_(rate)  # writes nothing and keeps all, or forgets all at each token
                block.mixer.log_decay.fill_(1.0)
    tokens_BT = random_rows(2, 130, seed=0)
    tokens_BT[0, 64] = END_ID
    logits_BTV = network(tokens_BT)
    torch.testing.assert_close(logits_BTV.detach(), by_steps(network, tokens_BT), rtol=1e-3, atol=1e-3)
    network.loss_sum(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
    assert logits_BTV.isfinite().all()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in network.parameters())


def test_every_parameter_takes_part() -> None:
    network = random_network(TINY, seed=2)
    network.loss_sum(random_rows(2, 40, 0), random_rows(2, 40, 1)).backward()
    idle = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []


def test_bf16_autocast_stays_close_to_fp32() -> None:
    network = network_of("RRA")
    tokens_BT = random_rows(4, 120, seed=0)
    tokens_BT[1, 50] = END_ID
    exact = whole(network, tokens_BT)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = whole(network, tokens_BT)
    assert rounded.dtype == torch.bfloat16
    off = (rounded.float() - exact).abs()
    # bf16 keeps 8 bits: a relative error of 2**-9 an operation, over some dozens of them.
    assert float(off.mean()) < 0.02 * float(exact.std())
    assert float(off.max()) < 0.2 * float(exact.std())


def test_the_shipped_network_has_the_stated_number_of_parameters() -> None:
    for config in (ModelConfig(), load_recipe("small").model, ModelFolder.open(PRETRAINED).config):
        network = StoryNetwork(config)
        assert network.parameter_count() == sum(value.numel() for value in network.state_dict().values())
        assert abs(network.parameter_count() / 5.2e6 - 1) < 0.02


@pytest.mark.parametrize("preset", ["recurrent", "transformer"])
def test_the_controls_are_of_the_same_size_in_the_same_code(preset: str) -> None:
    config = load_recipe(preset).model
    assert set(config.pattern) == {"R" if preset == "recurrent" else "A"}
    assert abs(StoryNetwork(config).parameter_count() / 5.2e6 - 1) < 0.02


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_new_network_is_its_own_embedding(pattern: str) -> None:
    torch.manual_seed(0)
    network = StoryNetwork(dataclasses.replace(TINY, pattern=pattern))
    tokens_BT = random_rows(2, 20, 0)
    table_VD = network.embedding.weight.detach()
    expected = rms_norm(rms_norm(table_VD[tokens_BT])) @ table_VD.T
    torch.testing.assert_close(whole(network, tokens_BT), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_nats_of_the_targets_that_count() -> None:
    network = network_of("RRA")
    tokens_BT, targets_BT = random_rows(2, 9, 0), random_rows(2, 9, 1)
    targets_BT[0, 3:] = -1
    logits = whole(network, tokens_BT).double().numpy()
    expected = sum(
        np.log(np.exp(logits[row, time]).sum()) - logits[row, time, target]
        for (row, time), target in np.ndenumerate(targets_BT.numpy())
        if target >= 0
    )
    with torch.no_grad():
        assert float(network.loss_sum(tokens_BT, targets_BT)) == pytest.approx(float(expected), rel=1e-5)


@given(near=st.integers(0, 300), apart=st.integers(0, 255), shift=st.integers(0, 4000), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_rotary_scores_depend_on_distance_alone(near: int, apart: int, shift: int, seed: int) -> None:
    query, key = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(seed))

    def score(at: int) -> float:
        ahead, behind = torch.tensor([at + apart]), torch.tensor([at])
        return float((rotate(query[None], ahead[None], 1e4) * rotate(key[None], behind[None], 1e4)).sum())

    assert score(near + shift) == pytest.approx(score(near), abs=0.02)
    assert float(rotate(query, torch.tensor([near]), 1e4).norm()) == pytest.approx(float(query.norm()), rel=1e-5)


# Dropout

TOKENS_BT = torch.randint(1, TINY.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))


def pair(dropout: float) -> tuple[StoryNetwork, StoryNetwork]:
    """The same weights without and with dropout, both in training mode."""
    plain = random_network(TINY)
    dropping = StoryNetwork(TINY, dropout=dropout)
    dropping.load_state_dict(plain.state_dict())
    return plain.train(), dropping.train()


def logits_of(network: StoryNetwork, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(TOKENS_BT)  # type: ignore[no-any-return]


def test_training_drops_by_the_rng() -> None:
    plain, dropping = pair(0.3)
    first = logits_of(dropping)
    assert not torch.allclose(first, logits_of(plain), atol=0.1)
    assert not torch.allclose(first, logits_of(dropping, seed=1), atol=0.1)
    assert torch.equal(first, logits_of(dropping))


def test_evaluation_and_the_step_form_drop_nothing() -> None:
    plain, dropping = pair(0.9)
    state = dropping.initial_state(len(TOKENS_BT))
    with torch.no_grad():
        for time in range(TOKENS_BT.size(1)):
            # Even one that was left in training mode.
            step_BV, state = dropping.step(TOKENS_BT[:, time], state)
            torch.testing.assert_close(step_BV, logits_of(plain)[:, time], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(dropping.eval()), logits_of(plain))


def test_a_share_of_zero_drops_nothing_bit_for_bit() -> None:
    plain, dropping = pair(0.0)
    assert torch.equal(logits_of(dropping), logits_of(plain))


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
    assert not torch.allclose(logits_of(dropping), logits_of(plain), atol=0.1)
    empty = StoryNetwork(TINY)  # a new network's branches give zero
    with torch.no_grad():
        empty.embedding.weight.copy_(plain.embedding.weight)
    assert torch.equal(logits_of(dropping), logits_of(empty))
