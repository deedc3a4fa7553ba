"""The exported graph under ONNX Runtime against the network in PyTorch, logit by logit.

What only trained weights can show is tested on the shipped ones; the rest on the small model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import load_network, save_network
from model.config import ModelConfig
from model.errors import ModelError
from model.folder import PRECISIONS, PRETRAINED
from model.network import END_OF_STORY_ID, StoryNetwork
from model.onnx_runtime import PREFILL_CHUNK, OnnxRuntime, OnnxState, same_state
from model.runtime import Logits
from model.tokenizer import StoryTokenizer
from tests.model.runtimes import both_precisions, decode, random_tokens, shipped, small
from tests.model.small_model import (
    SMALL,
    copy_of,
    random_network,
    small_folder,
    small_tokenizer,
    story_tokens,
    workplace,
)
from training.acceptance import BATCHES, LIMITS
from training.graph import WeightFile, build_graph
from training.own_corpus import load_own_stories


@cache
def network_in(folder: Path) -> StoryNetwork:
    return load_network(folder)


def torch_logits(folder: Path, tokens: Sequence[Sequence[int]]) -> Logits:
    """(B, T, V) of equally long rows, by the parallel form in fp32."""
    with torch.no_grad():
        return network_in(folder)(torch.tensor([list(row) for row in tokens])).numpy()  # type: ignore[no-any-return]


def worst(ours: Logits, theirs: Logits) -> float:
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max())


# The network's logits, on shipped weights


@cache
def stories_for_batches() -> list[list[int]]:
    """As many different story beginnings, of 28 tokens, as the largest batch has rows."""
    tokenizer = StoryTokenizer.load(PRETRAINED)
    return [tokens[:28] for tokens in story_tokens(tokenizer, max(BATCHES))]


@cache
def expected_for_batches() -> Logits:
    return torch_logits(PRETRAINED, stories_for_batches())


@both_precisions
def test_every_logit_at_every_batch_size_is_the_networks_on_shipped_weights(precision: str) -> None:
    runtime, stories, expected = shipped(precision), stories_for_batches(), expected_for_batches()
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
    assert max(off.values()) <= {"fp32": 1e-3, "int8": LIMITS["int8"]}[precision], off


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


@both_precisions
def test_a_story_longer_than_the_window_gives_the_networks_logits_at_every_token(precision: str) -> None:
    runtime, story, expected = shipped(precision), long_story(), long_story_logits()
    assert runtime.config.window == 256
    scored = np.concatenate([logits[0] for _, logits in runtime.score([story])])
    assert worst(scored, expected) <= LIMITS[precision]
    # The prefill ends before the window is full for the first time, the steps after it has turned twice.
    logits, state = runtime.prefill(story[:230])
    assert worst(logits, expected[229]) <= LIMITS[precision]
    stepped, state = decode(runtime, state, story[230:])
    assert worst(stepped, expected[230:]) <= LIMITS[precision]
    assert state.position == 640


# The network's logits, on the small model


@both_precisions
@given(
    first=st.integers(1, 150), second=st.integers(0, 150), steps=st.integers(0, 30), seed=st.integers(0, 99)
)
@settings(max_examples=15)
def test_prefill_whole_or_in_pieces_and_then_steps_give_the_networks_logits(
    precision: str, first: int, second: int, steps: int, seed: int
) -> None:
    runtime, tokens = small(precision), random_tokens(first + second + steps, seed)
    expected = torch_logits(small_folder(), [tokens])[0]
    logits, state = runtime.prefill(tokens[:first])
    assert worst(logits, expected[first - 1]) <= LIMITS[precision]
    if second:
        logits, state = runtime.prefill(tokens[first : first + second], state)
        assert worst(logits, expected[first + second - 1]) <= LIMITS[precision]
    assert state.position == first + second
    if steps:
        stepped, _ = decode(runtime, state, tokens[first + second :])
        assert worst(stepped, expected[first + second :]) <= LIMITS[precision]


@both_precisions
def test_a_cut_at_the_borders_of_pieces_changes_no_bit(precision: str) -> None:
    runtime, tokens = small(precision), random_tokens(3 * PREFILL_CHUNK + 5, seed=0)
    logits, state = runtime.prefill(tokens)
    _, half = runtime.prefill(tokens[: 2 * PREFILL_CHUNK])
    again, other = runtime.prefill(tokens[2 * PREFILL_CHUNK :], half)
    assert np.array_equal(logits, again)
    assert same_state(state, other)


@both_precisions
def test_scoring_stories_side_by_side_is_feeding_each_token_by_token(precision: str) -> None:
    runtime = small(precision)
    stories = [random_tokens(length, seed) for seed, length in enumerate((90, 1, 65, 64, 130))]
    pieces = list(runtime.score(stories))
    assert [first for first, _ in pieces] == [0, 64, 128]
    scored = np.concatenate([logits for _, logits in pieces], axis=1)
    assert scored.shape == (5, 130, SMALL.vocab_size)
    for row, story in enumerate(stories):
        stepped, _ = decode(runtime, runtime.empty, story)
        assert worst(scored[row, : len(story)], stepped) <= LIMITS[precision]


@both_precisions
def test_the_end_of_a_story_inside_a_run_starts_anew_as_in_the_network(precision: str) -> None:
    runtime = small(precision)
    tokens = [*random_tokens(70, 1), *random_tokens(9, 2), *random_tokens(30, 3)]
    expected = torch_logits(small_folder(), [tokens])[0]
    for cut in (40, 70, 75, 100):
        logits, state = runtime.prefill(tokens[:cut])
        assert worst(logits, expected[cut - 1]) <= LIMITS[precision]
        stepped, _ = decode(runtime, state, tokens[cut:])
        assert worst(stepped, expected[cut:]) <= LIMITS[precision]


def test_int8_is_another_computation_than_fp32() -> None:
    tokens = random_tokens(40, 0)
    assert not np.array_equal(small("int8").prefill(tokens)[0], small("fp32").prefill(tokens)[0])


def moved(state: OnnxState, by: int, runtime: OnnxRuntime) -> OnnxState:
    """The state that the same story has `by` tokens later: every key turned on, by the rotary angle of `by`."""
    config = runtime.config
    assert by % config.window == 0, "else the tokens would stand at other places of the ring"
    half = config.head_dim // 2
    angle = by * config.rope_base ** (-np.arange(half) / half)
    ring = state.ring.copy()
    keys = state.ring[0::2].astype(np.float64)  # keys and values of each layer take turns
    left, right = keys[..., :half], keys[..., half:]
    ring[0::2, :, :half] = left * np.cos(angle) - right * np.sin(angle)
    ring[0::2, :, half:] = right * np.cos(angle) + left * np.sin(angle)
    return dataclasses.replace(state, position=state.position + by, ring=ring)


@pytest.mark.parametrize("far", [10_240, 1_024_000])
def test_only_distances_matter_at_a_far_token_on_shipped_weights(far: int) -> None:
    runtime, story = shipped("fp32"), long_story()
    _, state = runtime.prefill(story[:300])
    near, _ = decode(runtime, state, story[300:312])
    late, end = decode(runtime, moved(state, far, runtime), story[300:312])
    assert end.position == far + 312
    assert worst(late, near) <= 1e-3
    wrong = dataclasses.replace(state, position=state.position + far)  # keys not turned: this must show
    assert worst(decode(runtime, wrong, story[300:312])[0], near) > 1e-2


def test_ten_thousand_tokens_on_the_window_is_as_it_was() -> None:
    """A network of attention alone sees no further than its layers' windows, wherever it stands."""
    config = dataclasses.replace(SMALL, pattern="AA", window=16)
    runtime = OnnxRuntime(random_folder(config) / "decode.fp32.onnx", config)
    seen = 2 * (config.window - 1) + 1
    tokens = random_tokens(10_050, seed=4)
    _, state = runtime.prefill(tokens[:10_000])
    late, _ = decode(runtime, state, tokens[10_000:])
    for place in (10_000, 10_049):
        alone, _ = runtime.prefill(tokens[place + 1 - seen : place + 1])
        assert worst(late[place - 10_000], alone) <= 1e-4


@cache
def random_folder(config: ModelConfig) -> Path:
    """A checkpoint of random weights, for a shape that no other here has, with both graphs beside it."""
    folder = Path(tempfile.mkdtemp(dir=workplace()))
    save_network(random_network(config), folder, tokenizer=small_tokenizer(), notes={}, dtype=torch.float16)
    source = WeightFile.read(folder / "model.safetensors")
    for precision in PRECISIONS:
        graph = build_graph(config, source, precision)
        (folder / f"decode.{precision}.onnx").write_bytes(graph.SerializeToString())
    return folder


@pytest.mark.parametrize("pattern", ["R", "A", "AAR"])
@both_precisions
def test_patterns_of_one_kind_and_of_both_give_the_networks_logits(pattern: str, precision: str) -> None:
    config = dataclasses.replace(SMALL, pattern=pattern)
    folder = random_folder(config)
    runtime = OnnxRuntime(folder / f"decode.{precision}.onnx", config)
    tokens = random_tokens(60, 9)
    expected = torch_logits(folder, [tokens])[0]
    logits, state = runtime.prefill(tokens[:40])
    stepped, _ = decode(runtime, state, tokens[40:])
    assert worst(np.concatenate([logits[None], stepped]), expected[39:]) <= LIMITS[precision]


# Bad use


def test_a_graph_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    damaged = copy_of(small_folder(), tmp_path / "model") / "decode.int8.onnx"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    for path in (tmp_path / "none.onnx", damaged):
        with pytest.raises(ModelError, match=rf"{path.name} cannot be loaded: .") as caught:
            OnnxRuntime(path, SMALL)
        assert "\n" not in str(caught.value)


def test_a_graph_without_its_weights_file_is_named(tmp_path: Path) -> None:
    folder = copy_of(small_folder(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for precision in PRECISIONS:
        with pytest.raises(ModelError, match=rf"decode\.{precision}\.onnx cannot be loaded"):
            OnnxRuntime(folder / f"decode.{precision}.onnx", SMALL)
