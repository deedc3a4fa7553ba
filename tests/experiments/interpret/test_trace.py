"""The explicit weights are what the network computes: compared with its own two forms."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.interpret.trace import (
    WHOLE,
    LayerWeights,
    StoryTrace,
    by_mention,
    cost_by_reach,
    cost_of_names,
    encode,
    limited_reach,
    mentions,
    token_nats,
    trace_story,
)
from model.architecture.network import RecurrentState, StoryNetwork
from model.architecture.tokenizer import StoryTokenizer
from model.errors import InputError
from tests.model.small_model import SMALL, random_network, small_tokenizer
from training.data.corpus import load_own_stories

TEXT = load_own_stories("heldout")[0].text


@cache
def network() -> StoryNetwork:
    return random_network(SMALL)


@cache
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer.load(small_tokenizer())


@cache
def trace() -> StoryTrace:
    return trace_story(network(), tokenizer(), TEXT)


def _inputs_and_outputs(tokens: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each layer, captured by hooks of this test's own."""
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        block.mixer.register_forward_hook(lambda _, given, out: taken.append((given[0][0], out[0])))  # type: ignore[union-attr]
        for block in network().blocks
    ]
    with torch.no_grad():
        network()(torch.tensor(tokens)[None])
    for handle in handles:
        handle.remove()
    return taken


@torch.no_grad()
def test_the_weights_give_each_layers_own_output() -> None:
    assert len(trace().tokens) > 4 * SMALL.window, "the story reaches over windows and chunks"
    outputs = [out for _, out in _inputs_and_outputs(trace().tokens)]
    assert (sorted(trace().recurrences), sorted(trace().attentions)) == ([0, 2], [1, 3])
    layers: dict[int, LayerWeights] = {**trace().recurrences, **trace().attentions}
    for number, weights in layers.items():
        made = weights.output(weights.weight_HTT)
        assert torch.allclose(made, outputs[number], atol=1e-4), f"layer {number}"
        assert outputs[number].abs().max() > 0.1, "a layer without output proves nothing"


def test_attention_is_positive_sums_to_one_and_stays_in_its_window() -> None:
    for weights in trace().attentions.values():
        weight = weights.weight_HTT
        assert torch.allclose(weight.sum(-1), torch.ones(weight.shape[:2]), atol=1e-5)
        assert weight.min() >= 0
        ago = torch.arange(weight.size(1))[:, None] - torch.arange(weight.size(2))
        assert weight[:, (ago < 0) | (ago >= SMALL.window)].abs().max() == 0
        assert weight[:, SMALL.window, 1].min() > 0, "the window is used to its end"


@torch.no_grad()
def test_what_is_left_of_each_token_adds_up_to_the_memory_of_the_step_form() -> None:
    state = network().initial_state(1)
    for token in trace().tokens:
        _, state = network().step(torch.tensor([token]), state)
    for number, weights in trace().recurrences.items():
        layer = state.layers[number]
        assert isinstance(layer, RecurrentState)
        left_HT = weights.survival()[:, -1]
        memory = torch.einsum("ht,thn,thp->hnp", left_HT, weights.key_THN, weights.value_THP)
        assert torch.allclose(memory, layer.memory_BHNP[0], atol=1e-4)
        size = torch.einsum("thn,thp->thnp", weights.key_THN, weights.value_THP).flatten(2).norm(dim=-1)
        assert torch.allclose(weights.left_at_the_end(), size.T * left_HT, rtol=1e-3, atol=1e-6)


def test_after_its_half_life_half_of_a_steady_memory_is_left() -> None:
    weights = trace().recurrences[0]
    half_life = weights.half_life()
    kept = weights.keep_TH.log().mean(0) * half_life
    assert torch.allclose(kept.exp(), torch.full_like(kept, 0.5))
    survival = weights.survival()
    assert torch.equal(torch.diagonal(survival, dim1=1, dim2=2), torch.ones(survival.shape[:2]))


def test_the_cost_of_a_story_is_the_networks_loss() -> None:
    fed = torch.tensor(trace().tokens)[None]
    with torch.no_grad():
        loss = float(network().loss_sum(fed[:, :-1], fed[:, 1:]))
    assert np.isnan(trace().nats[0])
    assert np.nansum(trace().nats) == pytest.approx(loss, rel=1e-5)
    assert "".join(trace().texts) == TEXT


@torch.no_grad()
def test_a_reach_that_covers_the_story_changes_nothing_and_a_short_one_hides_what_is_far() -> None:
    tokens = encode(tokenizer(), TEXT)
    whole = token_nats(network(), tokens)
    with limited_reach(network(), len(tokens), "recurrence", "attention"):
        assert np.allclose(token_nats(network(), tokens)[1:], whole[1:], atol=1e-3)
    changed = (tokens[0], *reversed(tokens[1:20]), *tokens[20:])
    assert not np.allclose(token_nats(network(), changed)[60:], whole[60:], atol=1e-3), "it does remember"
    # Four layers of reach 8, each recurrence behind a convolution of 4: nothing comes from 40 tokens ago.
    with limited_reach(network(), 8, "recurrence", "attention"):
        assert np.allclose(token_nats(network(), changed)[60:], token_nats(network(), tokens)[60:], atol=1e-5)
    assert np.array_equal(token_nats(network(), tokens)[1:], whole[1:]), "the hooks are gone"


def test_a_shortened_attention_is_attention_of_a_shorter_window() -> None:
    (inputs, _) = _inputs_and_outputs(trace().tokens)[1]
    weights = trace().attentions[1]
    narrow = random_network(SMALL.from_dict({**SMALL.as_dict(), "window": 8}))
    narrow.load_state_dict(network().state_dict())
    with torch.no_grad():
        theirs = narrow.blocks[1].mixer(inputs[None], torch.ones(1, len(inputs), dtype=torch.long))[0]  # type: ignore[operator]
        assert torch.allclose(weights.output(weights.within(8)), theirs, atol=1e-5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="must be a story of 1 to 2047 tokens, got 0"):
        trace_story(network(), tokenizer(), "")
    with pytest.raises(InputError, match="must be at least 1, got 0"), limited_reach(network(), 0, "attention"):
        pass
    with (
        pytest.raises(InputError, match="must be among recurrence, attention, got 'memory'"),
        limited_reach(
            network(),
            3,
            "memory",  # type: ignore[arg-type]
        ),
    ):
        pass


STORY = 'One day, Zoë met Mateo. "Hi, Mateo!" said Zoë. Mateo\'s hat fell in. So Tim ran, and Mateo too. Tomas saw.'


TEXTS = [story.text for story in load_own_stories("heldout")[:2]]


def test_each_mention_is_the_tokens_that_hold_the_name() -> None:
    tokens = encode(tokenizer(), STORY)
    found = mentions(STORY, tokenizer())
    assert [(name, number) for name, number, _ in found] == [("Mateo", number) for number in (1, 2, 3, 4)]
    for name, _, places in found:
        text = tokenizer().decode(tokens[place] for place in places)
        assert name in text
        assert len(text.strip("\"',.! ")) == len(name), f"{text!r} is more than the name"


def test_a_name_costs_the_sum_of_its_tokens_in_each_network() -> None:
    network = random_network(SMALL)
    frame = cost_of_names(network, tokenizer(), [STORY, "No one is here."])
    assert len(frame) == 4 * 4
    assert set(frame["story"]) == {0}
    nats = token_nats(network, encode(tokenizer(), STORY))
    expected = [nats[list(places)].sum() for _, _, places in mentions(STORY, tokenizer())]
    whole = frame[frame["network"] == WHOLE]["nats"]
    assert np.allclose(whole, expected)
    assert all(not np.allclose(group["nats"], expected) for label, group in frame.groupby("network") if label != WHOLE)


def test_means_are_over_all_mentions_and_late_ones_count_together() -> None:
    frame = cost_of_names(random_network(SMALL), tokenizer(), [STORY, STORY + " Then Mateo slept."])
    means = by_mention(frame, most=3)
    whole = means[means["network"] == WHOLE].set_index("mention")
    assert whole["n"].to_dict() == {1: 2, 2: 2, 3: 5}
    rows = frame[(frame["network"] == WHOLE) & (frame["mention"] >= 3)]
    assert whole.loc[3, "mean"] == pytest.approx(rows["nats"].mean())
    assert (whole["low"] <= whole["mean"]).all()
    assert (whole["mean"] <= whole["high"]).all()


def test_a_reach_over_the_whole_story_costs_what_the_whole_network_does() -> None:
    costs = cost_by_reach(random_network(SMALL), tokenizer(), TEXTS, (4, 512))
    assert isinstance(costs, pd.DataFrame)
    assert max(len(encode(tokenizer(), text)) for text in TEXTS) < 512
    whole = costs[costs["cut"] == "none"]["mean"].iloc[0]
    far = costs[costs["reach"] == 512]
    # Attention's own window stays: a longer reach than it cannot widen it.
    assert np.allclose(far["mean"], whole, atol=1e-4)
    assert (costs[costs["reach"] == 4]["mean"] != whole).all()
