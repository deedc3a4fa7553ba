"""Names are found where they stand, token for token, and their costs are those of the network."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.interpret.look import cost_of, encode
from experiments.interpret.mentions import WHOLE, by_mention, cost_of_names, mentions
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import SMALL, random_network, small_tokenizer

STORY = 'One day, Zoë met Mateo. "Hi, Mateo!" said Zoë. Mateo\'s hat fell in. So Tim ran, and Mateo too. Tomas saw.'


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
    nats = cost_of(network, encode(tokenizer, STORY))
    expected = [nats[list(places)].sum() for _, _, places in mentions(STORY, tokenizer)]
    whole = frame[frame["network"] == WHOLE]["nats"]
    assert np.allclose(whole, expected)
    assert all(
        not np.allclose(group["nats"], expected)
        for label, group in frame.groupby("network")
        if label != WHOLE
    )


def test_means_are_over_all_mentions_and_late_ones_count_together(tokenizer: StoryTokenizer) -> None:
    frame = cost_of_names(random_network(SMALL), tokenizer, [STORY, STORY + " Then Mateo slept."])
    means = by_mention(frame, most=3)
    whole = means[means["network"] == WHOLE].set_index("mention")
    assert whole["n"].to_dict() == {1: 2, 2: 2, 3: 5}
    rows = frame[(frame["network"] == WHOLE) & (frame["mention"] >= 3)]
    assert whole.loc[3, "mean"] == pytest.approx(rows["nats"].mean())
    assert (whole["low"] <= whole["mean"]).all()
    assert (whole["mean"] <= whole["high"]).all()
