"""The figures show the numbers they are given, and every letter of a story."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.interpret.figures import (
    TEXT_COLUMNS,
    draw_attention,
    draw_half_lives,
    draw_mentions,
    draw_reach,
    draw_text,
)
from experiments.interpret.trace import by_mention, cost_by_reach, cost_of_names, trace_story
from model.architecture.tokenizer import StoryTokenizer
from tests.model.small_model import SMALL, random_network, small_tokenizer
from training.data.corpus import load_own_stories

TEXTS = [story.text for story in load_own_stories("heldout")[:2]]


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer.load(small_tokenizer())


def _letters(figure: Figure) -> str:
    return "".join(text.get_text() for text in figure.axes[0].texts)


def test_a_drawn_story_has_every_letter_and_its_darkest_background_is_the_largest_value() -> None:
    texts = ["", "Once", " up", "on", " a", " cat", ".\n", '"Mi', 'aow," it said.', *[" and on"] * 40]
    values = [np.nan, 0.0, 1.0, 2.0, 8.0, *[0.5] * 44]
    figure = draw_text(texts, values, title="A title", scale="nats", marked=4)
    assert _letters(figure).replace(" ", "") == "".join(texts).replace(" ", "").replace("\n", "")
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert max(box.get_x() + box.get_width() for box in boxes) <= TEXT_COLUMNS
    framed = [box for box in boxes if to_rgba(box.get_edgecolor())[3] > 0]
    darkest = min(boxes, key=lambda box: sum(to_rgba(box.get_facecolor())[:3]))
    assert framed == [darkest]


def test_the_pictures_of_a_network_hold_all_its_layers(tokenizer: StoryTokenizer) -> None:
    trace = trace_story(random_network(SMALL), tokenizer, TEXTS[0])
    dots = [line for line in draw_half_lives(trace).axes[0].get_lines() if line.get_marker() == "o"]
    assert [np.asarray(line.get_ydata()).tolist() for line in dots] == [
        sorted(weights.half_life().tolist()) for weights in trace.recurrences.values()
    ]
    shown = [axes.images[0] for axes in draw_attention(trace, count=20).axes if axes.images]
    assert len(shown) == 2 * SMALL.heads
    drawn = np.asarray(shown[1].get_array()) ** 2
    assert np.allclose(drawn, trace.attentions[1].weight_HTT[1, :20, :20], atol=1e-6)


def test_the_pictures_of_many_stories_hold_their_means(tokenizer: StoryTokenizer) -> None:
    network = random_network(SMALL)
    means = by_mention(cost_of_names(network, tokenizer, TEXTS))
    assert len(draw_mentions(means).axes[0].containers) == means["network"].nunique() == 4
    costs = cost_by_reach(network, tokenizer, TEXTS, (4, 512))
    (axes,) = draw_reach(costs).axes
    assert [container.get_label() for container in axes.containers] == ["attention limited", "recurrences limited"]
