"""Names are found token by token, their costs are the network's, and a full reach changes nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.interpret.ablation import WHOLE, by_mention, cost_by_reach, cost_of_names, mentions
from experiments.interpret.trace import encode, token_nats
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import SMALL, random_network, small_tokenizer
from training.data.corpus import load_own_stories

STORY = 'One day, Zoë met Mateo. "Hi, Mateo!" said Zoë. Mateo\'s hat fell in. So Tim ran, and Mateo too. Tomas saw.'


TEXTS = [story.text for story in load_own_stories("heldout")[:2]]


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer.load(small_tokenizer())


def test_each_mention_is_the_tokens_that_hold_the_name(tokenizer: StoryTokenizer) -> None:
    tokens = encode(tokenizer, STORY)
    found = mentions(STORY, tokenizer)
    assert [(name, number) for name, number, _ in found] == [("Mateo", number) for number in (1, 2, 3, 4)]
    for name, _, places in found:
        text = tokenizer.decode(tokens[place] for place in places)
        assert name in text
        assert len(text.strip("\"',.! ")) == len(name), f"{text!r} is more than the name"


def test_a_name_costs_the_sum_of_its_tokens_in_each_network(tokenizer: StoryTokenizer) -> None:
    network = random_network(SMALL)
    frame = cost_of_names(network, tokenizer, [STORY, "No one is here."])
    assert len(frame) == 4 * 4
    assert set(frame["story"]) == {0}
    nats = token_nats(network, encode(tokenizer, STORY))
    expected = [nats[list(places)].sum() for _, _, places in mentions(STORY, tokenizer)]
    whole = frame[frame["network"] == WHOLE]["nats"]
    assert np.allclose(whole, expected)
    assert all(not np.allclose(group["nats"], expected) for label, group in frame.groupby("network") if label != WHOLE)


def test_means_are_over_all_mentions_and_late_ones_count_together(tokenizer: StoryTokenizer) -> None:
    frame = cost_of_names(random_network(SMALL), tokenizer, [STORY, STORY + " Then Mateo slept."])
    means = by_mention(frame, most=3)
    whole = means[means["network"] == WHOLE].set_index("mention")
    assert whole["n"].to_dict() == {1: 2, 2: 2, 3: 5}
    rows = frame[(frame["network"] == WHOLE) & (frame["mention"] >= 3)]
    assert whole.loc[3, "mean"] == pytest.approx(rows["nats"].mean())
    assert (whole["low"] <= whole["mean"]).all()
    assert (whole["mean"] <= whole["high"]).all()


def test_a_reach_over_the_whole_story_costs_what_the_whole_network_does(tokenizer: StoryTokenizer) -> None:
    costs = cost_by_reach(random_network(SMALL), tokenizer, TEXTS, (4, 512))
    assert isinstance(costs, pd.DataFrame)
    assert max(len(encode(tokenizer, text)) for text in TEXTS) < 512
    whole = costs[costs["cut"] == "none"]["mean"].iloc[0]
    far = costs[costs["reach"] == 512]
    # Attention's own window stays: a longer reach than it cannot widen it.
    assert np.allclose(far["mean"], whole, atol=1e-4)
    assert (costs[costs["reach"] == 4]["mean"] != whole).all()
