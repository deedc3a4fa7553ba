"""The exported graph under ONNX Runtime against the network in PyTorch, and a batch against its rows alone.

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

import training.graph
from model.checkpoint import load_network, save_network
from model.config import ModelConfig
from model.errors import ModelError
from model.folder import PRECISIONS, PRETRAINED, ModelFolder
from model.load import load_runtime
from model.network import END_OF_STORY_ID, StoryNetwork
from model.onnx_runtime import PREFILL_CHUNK, OnnxBatch, OnnxRuntime, OnnxState, same_state
from model.runtime import Logits
from model.tokenizer import StoryTokenizer
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

both_precisions = pytest.mark.parametrize("precision", PRECISIONS)


@cache
def shipped(precision: str) -> OnnxRuntime:
    return load_runtime(ModelFolder.open(PRETRAINED), slots=max(BATCHES), precision=precision)


@cache
def small(precision: str) -> OnnxRuntime:
    return load_runtime(ModelFolder.open(small_folder()), slots=8, precision=precision)


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


def random_tokens(count: int, seed: int, vocab_size: int = SMALL.vocab_size) -> list[int]:
    """A story's beginning of `count` tokens: the end of story, then anything else."""
    rng = np.random.default_rng(seed)
    return [END_OF_STORY_ID, *map(int, rng.integers(1, vocab_size, count - 1))]


def decode(runtime: OnnxRuntime, state: OnnxState, tokens: Sequence[int]) -> tuple[Logits, OnnxState]:
    """One stream alone, token by token: logits (T, V) and the last state."""
    batch = runtime.new_batch()
    batch.append(state)
    logits = [runtime.step(np.array([token]), batch)[0].copy() for token in tokens]
    return np.array(logits), batch.read(0)


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


# Nobody's bits depend on company


def check_company(runtime: OnnxRuntime, streams: int, steps: int, seed: int) -> set[int]:
    """Streams join and leave at random; each row's logits must be the bits that the stream gets alone.

    A stream that leaves before its end is read, waits, and comes back later. Returns the batch sizes met.
    """
    vocab = runtime.vocab_size
    rng = np.random.default_rng(seed)
    tokens = [random_tokens(3 + int(rng.integers(6)) + steps, stream, vocab) for stream in range(streams)]
    waiting = {stream: runtime.prefill(tokens[stream][:-steps])[1] for stream in range(streams)}
    alone = {stream: decode(runtime, waiting[stream], tokens[stream][-steps:]) for stream in range(streams)}
    batch, rows, done, sizes = runtime.new_batch(), list[int](), dict.fromkeys(range(streams), 0), set[int]()
    while waiting or rows:
        joining = (
            rng.permutation(sorted(waiting))[: rng.integers(len(waiting) + 1)] if rows else list(waiting)
        )
        for stream in map(int, joining):
            assert batch.append(waiting.pop(stream)) == len(rows)
            rows.append(stream)
        logits = runtime.step(np.array([tokens[stream][done[stream] - steps] for stream in rows]), batch)
        sizes.add(len(rows))
        for row, stream in enumerate(rows):
            assert np.array_equal(logits[row], alone[stream][0][done[stream]]), (len(rows), row)
            done[stream] += 1
        for row in reversed(range(len(rows))):
            finished = done[rows[row]] == steps
            if finished or rng.random() < 0.4:
                state = batch.read(row)
                batch.remove(row)
                if finished:
                    assert same_state(state, alone[rows[row]][1])
                else:
                    waiting[rows[row]] = state
                rows[row] = rows[-1]
                rows.pop()
    assert len(batch) == 0
    return sizes


@both_precisions
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_has_the_same_bits_alone_and_in_any_company_on_shipped_weights(
    precision: str, seed: int
) -> None:
    sizes = check_company(shipped(precision), streams=64 if seed else 19, steps=4, seed=seed)
    assert len(sizes) >= 4
    assert max(sizes) == (64 if seed else 19)


@both_precisions
@given(streams=st.integers(1, 8), steps=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    precision: str, streams: int, steps: int, seed: int
) -> None:
    check_company(small(precision), streams, steps, seed)


@pytest.mark.parametrize("block", [16, 32, 128])
def test_company_does_not_show_where_kernels_sum_one_row_otherwise(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With int8 blocks of 128 it did, on a processor with AVX-512: rows are then computed in pairs."""
    monkeypatch.setattr(training.graph, "BITS_BLOCK", block)
    folder = copy_of(PRETRAINED, tmp_path / "model")
    config = ModelFolder.open(folder).config
    path = folder / "other.onnx"
    path.write_bytes(
        build_graph(config, WeightFile.read(folder / "model.safetensors"), "int8").SerializeToString()
    )
    check_company(OnnxRuntime(path, config, max_batch=5), streams=5, steps=3, seed=0)


@both_precisions
def test_rows_that_nobody_reads_change_no_bit(precision: str) -> None:
    plain = small(precision)
    padded = load_runtime(ModelFolder.open(small_folder()), slots=5, precision=precision)
    padded.tile = 4 * plain.tile
    padded._make_room(-(-padded.max_batch // padded.tile) * padded.tile)
    states = [plain.prefill(random_tokens(30 + stream, stream))[1] for stream in range(5)]
    batches = plain.new_batch(), padded.new_batch()
    for step in range(20):
        for batch in batches:
            if step % 4 == 0:
                batch.append(states[step // 4])
            if step == 9:
                batch.remove(0)
        fed = np.arange(1, len(batches[0]) + 1) * 7
        assert np.array_equal(plain.step(fed, batches[0]), padded.step(fed, batches[1]))
    batches[1].append(states[0])
    with pytest.raises(IndexError, match="at most 5"):
        batches[1].append(states[0])


@both_precisions
def test_a_stream_that_turned_into_nan_touches_no_other(precision: str) -> None:
    runtime = small(precision)
    states = [runtime.prefill(random_tokens(30, stream))[1] for stream in range(4)]
    sick = dataclasses.replace(
        states[1],
        conv=np.full_like(states[1].conv, np.nan),
        memory=np.full_like(states[1].memory, np.nan),
        ring=np.full_like(states[1].ring, np.nan),
    )
    alone = [decode(runtime, state, range(1, 6))[0] for state in states]
    batch = runtime.new_batch()
    for state in (states[0], sick, *states[2:]):
        batch.append(state)
    for step, token in enumerate(range(1, 4)):
        logits = runtime.step(np.full(4, token), batch)
        assert np.isnan(logits[1]).all()
        assert all(np.array_equal(logits[row], alone[row][step]) for row in (0, 2, 3))
    # Its row is given to the next stream, of which nothing may be sick.
    batch.remove(1)
    batch.append(states[1])
    logits = runtime.step(np.array([4, 4, 4, 1]), batch)
    assert np.array_equal(logits[3], alone[1][0])
    assert np.array_equal(logits[1], alone[3][3])  # the last row had moved up


# States and batches


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 5)),
    st.tuples(st.just("remove"), st.integers(0, 7)),
    st.tuples(st.just("fork"), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(1, 300)),
)


@both_precisions
@given(operations=st.lists(OPERATION, max_size=25))
@settings(max_examples=25)
def test_a_batch_behaves_as_a_list_of_streams(precision: str, operations: list[tuple[str, int]]) -> None:
    """Against a list of states that are stepped one by one, to the last bit."""
    runtime = small(precision)
    prepared = [runtime.prefill(random_tokens(4 + 9 * n, n))[1] for n in range(6)]
    batch, model = runtime.new_batch(), list[OnnxState]()
    for kind, value in operations:
        if kind == "append" and len(model) < runtime.max_batch:
            assert batch.append(prepared[value]) == len(model)
            model.append(prepared[value])
        elif kind == "remove" and value < len(model):
            batch.remove(value)
            model[value] = model[-1]
            model.pop()
        elif kind == "fork" and value < len(model) < runtime.max_batch:
            assert batch.append(batch.read(value)) == len(model)
            model.append(model[value])
        elif kind == "step" and model:
            fed = [value % 300 + 1 + row for row in range(len(model))]
            logits = runtime.step(np.array(fed), batch).copy()
            for row, state in enumerate(model):
                expected, model[row] = decode(runtime, state, [fed[row]])
                assert np.array_equal(logits[row], expected[0])
        assert len(batch) == len(model)
        assert all(same_state(batch.read(row), state) for row, state in enumerate(model))


def bits(state: OnnxState) -> tuple[int, bytes, bytes, bytes]:
    return state.position, state.conv.tobytes(), state.memory.tobytes(), state.ring.tobytes()


@both_precisions
def test_a_state_once_handed_out_never_changes(precision: str) -> None:
    runtime = small(precision)
    _, state = runtime.prefill(random_tokens(40, 0))
    before = bits(state)
    batch = runtime.new_batch()
    batch.append(state)
    read = batch.read(0)
    assert bits(read) == before
    for token in (5, 6, 7):
        runtime.step(np.array([token]), batch)
    later = batch.read(0)
    runtime.prefill([8, 9], state)
    batch.remove(0)
    batch.append(runtime.empty)
    assert bits(state) == bits(read) == before
    assert bits(later) != before
    assert bits(later) == bits(decode(runtime, state, (5, 6, 7))[1])


@both_precisions
def test_a_forked_story_goes_on_as_the_one_it_was_forked_from(precision: str) -> None:
    runtime = small(precision)
    tokens = random_tokens(60, 6)
    whole, _ = decode(runtime, runtime.empty, tokens)
    _, middle = decode(runtime, runtime.empty, tokens[:33])
    rest, _ = decode(runtime, middle, tokens[33:])
    assert np.array_equal(rest, whole[33:])


def test_a_state_has_the_same_size_however_long_the_story() -> None:
    runtime = small("fp32")
    sizes = {runtime.prefill(random_tokens(length, 0))[1].nbytes for length in (1, 2, 25, 200)}
    assert sizes == {runtime.empty.nbytes}


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


def test_a_batch_has_the_room_that_was_asked_for_and_no_more() -> None:
    runtime = small("fp32")
    batch = runtime.new_batch()
    for _ in range(runtime.max_batch):
        batch.append(runtime.empty)
    with pytest.raises(IndexError, match="at most 8 streams"):
        batch.append(runtime.empty)
    for row in (-1, 8):
        with pytest.raises(IndexError, match="row must be below 8"):
            batch.remove(row)
        with pytest.raises(IndexError, match="row must be below 8"):
            batch.read(row)


def test_tokens_must_be_as_many_as_streams() -> None:
    runtime = small("fp32")
    batch: OnnxBatch = runtime.new_batch()
    assert runtime.step(np.zeros(0, np.int64), batch).shape == (0, SMALL.vocab_size)
    batch.append(runtime.empty)
    batch.append(runtime.empty)
    for tokens in (np.array([3]), np.array([3, 4, 5])):
        with pytest.raises(ValueError, match="one token for each of 2 streams"):
            runtime.step(tokens, batch)
    with pytest.raises(ValueError, match="at least one token"):
        runtime.prefill([])
