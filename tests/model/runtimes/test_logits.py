"""Each runtime against the network in PyTorch, logit by logit.

What only trained weights can show is tested on the shipped ones; the rest on the small model.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.architecture.folder import END_ID, PRETRAINED, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.runtimes.protocol import PREFILL_CHUNK, Logits
from tests.model.runtimes.shared import (
    EMBEDDED,
    LIMITS,
    bits,
    decode,
    load_kind,
    network_logits,
    random_folder,
    random_tokens,
    small,
    worst,
)
from tests.model.small_model import SMALL, small_folder, story_tokens
from training.data.corpus import load_own_stories
from training.export.export import BATCHES

# The network's logits, on shipped weights


@cache
def stories_for_batches() -> tuple[list[list[int]], Logits]:
    """As many different story beginnings, of 28 tokens, as the largest batch has rows; and the network's logits."""
    tokenizer = StoryTokenizer.load(PRETRAINED)
    stories = [tokens[:28] for tokens in story_tokens(tokenizer, max(BATCHES))]
    return stories, network_logits(PRETRAINED, stories)


def test_every_logit_at_every_batch_size_is_the_networks_on_shipped_weights(kind: str, shipped_runtime: Any) -> None:
    stories, expected = stories_for_batches()
    assert len(stories) == 64
    prefilled = [shipped_runtime.prefill(story[:20]) for story in stories]
    off = {0: worst(np.array([logits for logits, _ in prefilled]), expected[:, 19])}
    for size in BATCHES:
        batch = shipped_runtime.new_batch()
        for _, state in prefilled[:size]:
            batch.append(state)
        for place in range(20, 28 if size < 16 else 24):
            fed = np.array([story[place] for story in stories[:size]])
            off[size] = max(off.get(size, 0.0), worst(shipped_runtime.step(fed, batch), expected[:size, place]))
    assert list(off) == [0, 1, 2, 3, 8, 16, 32, 64]
    assert max(off.values()) <= LIMITS[kind], off


@cache
def long_story() -> tuple[list[int], Logits]:
    """640 tokens, far beyond the window: some of our own stories as one; and the network's logits."""
    tokenizer = StoryTokenizer.load(PRETRAINED)
    text = "\n".join(story.text for story in load_own_stories("heldout")[:8])
    tokens = [END_ID, *tokenizer.encode(text)][:640]
    assert len(tokens) == 640
    return tokens, network_logits(PRETRAINED, [tokens])[0]


def test_a_story_longer_than_the_window_gives_the_networks_logits_at_every_token(
    kind: str, shipped_runtime: Any
) -> None:
    (story, expected), limit = long_story(), LIMITS[kind]
    assert shipped_runtime.config.window == 256
    if kind != "torch":
        scored = np.concatenate([logits[0] for _, logits in shipped_runtime.score([story])])
        assert worst(scored, expected) <= limit
    # Steps begin before the window is full for the first time; the prefill after them goes round once more.
    logits, state = shipped_runtime.prefill(story[:230])
    assert worst(logits, expected[229]) <= limit
    stepped, state = decode(shipped_runtime, state, story[230:300])
    assert worst(stepped, expected[230:300]) <= limit
    logits, state = shipped_runtime.prefill(story[300:560], state)
    assert worst(logits, expected[559]) <= limit
    stepped, state = decode(shipped_runtime, state, story[560:])
    assert worst(stepped, expected[560:]) <= limit
    assert state.position == 640


# The network's logits, on the small model


@given(first=st.integers(1, 150), second=st.integers(0, 150), steps=st.integers(0, 30), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_prefill_in_one_or_two_calls_and_then_steps_give_the_networks_logits(
    kind: str, runtime: Any, first: int, second: int, steps: int, seed: int
) -> None:
    tokens = random_tokens(first + second + steps, seed)
    expected = network_logits(small_folder(), [tokens])[0]
    logits, state = runtime.prefill(tokens[:first])
    assert worst(logits, expected[first - 1]) <= LIMITS[kind]
    if second:
        logits, state = runtime.prefill(tokens[first : first + second], state)
        assert worst(logits, expected[first + second - 1]) <= LIMITS[kind]
    assert state.position == first + second
    if steps:
        stepped, _ = decode(runtime, state, tokens[first + second :])
        assert worst(stepped, expected[first + second :]) <= LIMITS[kind]


def test_a_cut_at_the_borders_of_chunks_changes_no_bit(runtime: Any) -> None:
    tokens = random_tokens(3 * PREFILL_CHUNK + 5, seed=0)
    logits, state = runtime.prefill(tokens)
    _, half = runtime.prefill(tokens[: 2 * PREFILL_CHUNK])
    again, other = runtime.prefill(tokens[2 * PREFILL_CHUNK :], half)
    assert np.array_equal(logits, again)
    assert bits(state) == bits(other)


@pytest.mark.parametrize("embedded", EMBEDDED)
def test_scoring_stories_side_by_side_is_feeding_each_token_by_token(embedded: str) -> None:
    runtime = small(embedded)
    stories = [random_tokens(length, seed) for seed, length in enumerate((90, 1, 65, 64, 130))]
    chunks = list(runtime.score(stories))
    assert [first for first, _ in chunks] == [0, 64, 128]
    scored = np.concatenate([logits for _, logits in chunks], axis=1)
    assert scored.shape == (5, 130, SMALL.vocab_size)
    for row, story in enumerate(stories):
        stepped, _ = decode(runtime, runtime.empty, story)
        assert worst(scored[row, : len(story)], stepped) <= LIMITS[embedded]


def test_the_end_of_a_story_inside_a_run_starts_anew_as_in_the_network(kind: str, runtime: Any) -> None:
    tokens = [*random_tokens(70, 1), *random_tokens(9, 2), *random_tokens(30, 3)]
    expected = network_logits(small_folder(), [tokens])[0]
    for cut in (40, 70, 75, 100):
        logits, state = runtime.prefill(tokens[:cut])
        assert worst(logits, expected[cut - 1]) <= LIMITS[kind]
        stepped, end = decode(runtime, state, tokens[cut:])
        assert worst(stepped, expected[cut:]) <= LIMITS[kind]
        assert end.position == 30


@pytest.mark.parametrize("pattern", ["R", "A", "AAR"])
def test_patterns_of_one_kind_and_of_both_give_the_networks_logits(pattern: str, kind: str) -> None:
    folder = random_folder(dataclasses.replace(SMALL, pattern=pattern))
    runtime, tokens = load_kind(kind, ModelFolder.open(folder), 4), random_tokens(130, 9)
    expected = network_logits(folder, [tokens])[0]
    logits, state = runtime.prefill(tokens[:70])
    stepped, _ = decode(runtime, state, tokens[70:])
    assert worst(np.concatenate([logits[None], stepped]), expected[69:]) <= max(LIMITS[kind], 1e-3)


def test_ten_thousand_tokens_on_the_window_is_as_it_was(kind: str) -> None:
    """A network of attention alone sees no further than its layers' windows, wherever it stands."""
    config = dataclasses.replace(SMALL, pattern="AA", window=16)
    runtime = load_kind(kind, ModelFolder.open(random_folder(config)), 4)
    seen = 2 * (config.window - 1) + 1
    tokens = random_tokens(10_050, seed=4)
    _, state = runtime.prefill(tokens[:10_000])
    late, _ = decode(runtime, state, tokens[10_000:])
    for place in (10_000, 10_049):
        alone, _ = runtime.prefill(tokens[place + 1 - seen : place + 1])
        # In int8 another place's angles may tip a rounding.
        assert worst(late[place - 10_000], alone) <= (1e-4 if kind in ("fp32", "torch") else 0.2)


def test_prefill_needs_a_token(runtime: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        runtime.prefill([])
