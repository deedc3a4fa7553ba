"""Each embedded runtime against the network in PyTorch, logit by logit.

What only trained weights can show is tested on the shipped ones; the rest on the small model.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.architecture.folder import PRETRAINED, ModelFolder
from model.architecture.network import END_OF_STORY_ID
from model.architecture.tokenizer import StoryTokenizer
from model.runtimes.protocol import PREFILL_CHUNK, Logits
from tests.model.all_runtimes import (
    LIMITS,
    bits,
    decode,
    every_runtime,
    load_kind,
    random_folder,
    random_tokens,
    shipped,
    small,
    torch_logits,
    worst,
)
from tests.model.small_model import SMALL, small_folder, story_tokens
from training.data.corpus import load_own_stories
from training.export.acceptance import BATCHES

# The network's logits, on shipped weights


@cache
def stories_for_batches() -> list[list[int]]:
    """As many different story beginnings, of 28 tokens, as the largest batch has rows."""
    tokenizer = StoryTokenizer.load(PRETRAINED)
    return [tokens[:28] for tokens in story_tokens(tokenizer, max(BATCHES))]


@cache
def expected_for_batches() -> Logits:
    return torch_logits(PRETRAINED, stories_for_batches())


@every_runtime
def test_every_logit_at_every_batch_size_is_the_networks_on_shipped_weights(kind: str) -> None:
    runtime, stories, expected = shipped(kind), stories_for_batches(), expected_for_batches()
    assert len(stories) == 64
    prefilled = [runtime.prefill(story[:20]) for story in stories]
    off = {0: worst(np.array([logits for logits, _ in prefilled]), expected[:, 19])}
    for size in BATCHES:
        batch = runtime.new_batch()
        for _, state in prefilled[:size]:
            batch.append(state)
        steps = range(20, 28) if size < 16 else range(20, 24)
        off[size] = max(
            worst(runtime.step(np.array([s[place] for s in stories[:size]]), batch), expected[:size, place])
            for place in steps
        )
    assert list(off) == [0, 1, 2, 3, 8, 16, 32, 64]
    assert max(off.values()) <= LIMITS[kind], off


@cache
def long_story() -> list[int]:
    """640 tokens: some of our own stories told as one, far beyond the window."""
    tokenizer = StoryTokenizer.load(PRETRAINED)
    text = "\n".join(story.text for story in load_own_stories("heldout")[:8])
    tokens = [END_OF_STORY_ID, *tokenizer.encode(text)][:640]
    assert len(tokens) == 640
    return tokens


@cache
def long_story_logits() -> Logits:
    logits: Logits = torch_logits(PRETRAINED, [long_story()])[0]
    return logits


@every_runtime
def test_a_story_longer_than_the_window_gives_the_networks_logits_at_every_token(kind: str) -> None:
    runtime, story, expected = shipped(kind), long_story(), long_story_logits()
    assert runtime.config.window == 256
    scored = np.concatenate([logits[0] for _, logits in runtime.score([story])])
    assert worst(scored, expected) <= LIMITS[kind]
    # The prefill ends before the window is full for the first time, the steps after it has turned twice.
    logits, state = runtime.prefill(story[:230])
    assert worst(logits, expected[229]) <= LIMITS[kind]
    stepped, state = decode(runtime, state, story[230:])
    assert worst(stepped, expected[230:]) <= LIMITS[kind]
    assert state.position == 640


# The network's logits, on the small model


@every_runtime
@given(
    first=st.integers(1, 150), second=st.integers(0, 150), steps=st.integers(0, 30), seed=st.integers(0, 99)
)
@settings(max_examples=15)
def test_prefill_whole_or_in_pieces_and_then_steps_give_the_networks_logits(
    kind: str, first: int, second: int, steps: int, seed: int
) -> None:
    runtime, tokens = small(kind), random_tokens(first + second + steps, seed)
    expected = torch_logits(small_folder(), [tokens])[0]
    logits, state = runtime.prefill(tokens[:first])
    assert worst(logits, expected[first - 1]) <= LIMITS[kind]
    if second:
        logits, state = runtime.prefill(tokens[first : first + second], state)
        assert worst(logits, expected[first + second - 1]) <= LIMITS[kind]
    assert state.position == first + second
    if steps:
        stepped, _ = decode(runtime, state, tokens[first + second :])
        assert worst(stepped, expected[first + second :]) <= LIMITS[kind]


@every_runtime
def test_a_cut_at_the_borders_of_pieces_changes_no_bit(kind: str) -> None:
    runtime, tokens = small(kind), random_tokens(3 * PREFILL_CHUNK + 5, seed=0)
    logits, state = runtime.prefill(tokens)
    _, half = runtime.prefill(tokens[: 2 * PREFILL_CHUNK])
    again, other = runtime.prefill(tokens[2 * PREFILL_CHUNK :], half)
    assert np.array_equal(logits, again)
    assert bits(state) == bits(other)


@every_runtime
def test_scoring_stories_side_by_side_is_feeding_each_token_by_token(kind: str) -> None:
    runtime = small(kind)
    stories = [random_tokens(length, seed) for seed, length in enumerate((90, 1, 65, 64, 130))]
    pieces = list(runtime.score(stories))
    assert [first for first, _ in pieces] == [0, 64, 128]
    scored = np.concatenate([logits for _, logits in pieces], axis=1)
    assert scored.shape == (5, 130, SMALL.vocab_size)
    for row, story in enumerate(stories):
        stepped, _ = decode(runtime, runtime.empty, story)
        assert worst(scored[row, : len(story)], stepped) <= LIMITS[kind]


@every_runtime
def test_the_end_of_a_story_inside_a_run_starts_anew_as_in_the_network(kind: str) -> None:
    runtime = small(kind)
    tokens = [*random_tokens(70, 1), *random_tokens(9, 2), *random_tokens(30, 3)]
    expected = torch_logits(small_folder(), [tokens])[0]
    for cut in (40, 70, 75, 100):
        logits, state = runtime.prefill(tokens[:cut])
        assert worst(logits, expected[cut - 1]) <= LIMITS[kind]
        stepped, _ = decode(runtime, state, tokens[cut:])
        assert worst(stepped, expected[cut:]) <= LIMITS[kind]


@pytest.mark.parametrize("pattern", ["R", "A", "AAR"])
@every_runtime
def test_patterns_of_one_kind_and_of_both_give_the_networks_logits(pattern: str, kind: str) -> None:
    config = dataclasses.replace(SMALL, pattern=pattern)
    folder = random_folder(config)
    runtime = load_kind(kind, ModelFolder.open(folder), 4)
    tokens = random_tokens(60, 9)
    expected = torch_logits(folder, [tokens])[0]
    logits, state = runtime.prefill(tokens[:40])
    stepped, _ = decode(runtime, state, tokens[40:])
    assert worst(np.concatenate([logits[None], stepped]), expected[39:]) <= LIMITS[kind]


@every_runtime
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
        assert worst(late[place - 10_000], alone) <= (1e-4 if kind == "fp32" else 0.2)
