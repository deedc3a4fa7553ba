"""The PyTorch runtime on a real GPU: what the other tests cannot show without one.

The first to be run on a machine that has a GPU: `make pytest ARGS='-m cuda'`. They have not been run on one yet.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from model.architecture.folder import PRETRAINED
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.generation import GenerationRequest, SamplingParams
from model.runtimes.sampling import SamplingRows
from model.runtimes.torch.forward import CudaGraphs, eager
from model.runtimes.torch.runtime import DeviceRuntime
from model.runtimes.torch.sampling import DeviceLogits, DeviceSampler
from tests.model.runtimes.shared import check_batch_invariance, decode, random_tokens, shipped, worst
from tests.model.runtimes.test_sampling import some_logits
from tests.model.small_model import story_tokens
from training.export.export import BATCHES, LIMITS

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")]


@cache
def runtime() -> DeviceRuntime:
    return DeviceRuntime.load(PRETRAINED, max_batch=max(BATCHES), device="cuda")


def test_every_logit_at_every_batch_size_is_the_graphs() -> None:
    ours, graph = runtime(), shipped("fp32")
    stories = [tokens[:40] for tokens in story_tokens(StoryTokenizer.load(PRETRAINED), max(BATCHES))]
    for size in BATCHES:
        batch, other = ours.new_batch(), graph.new_batch()
        for story in stories[:size]:
            logits, state = ours.prefill(story[:20])
            expected, its_state = graph.prefill(story[:20])
            assert worst(logits, expected) <= LIMITS["fp32"]
            batch.append(state)
            other.append(its_state)
        for place in range(20, 40):
            fed = np.array([story[place] for story in stories[:size]])
            assert worst(ours.step(fed, batch), graph.step(fed, other)) <= LIMITS["fp32"], (size, place)


def test_streams_that_come_and_go_keep_their_bits() -> None:
    assert max(check_batch_invariance(runtime(), streams=64, steps=6, seed=0)) == 64


def test_a_captured_step_is_the_eager_one() -> None:
    captured = runtime()
    plain = DeviceRuntime.load(PRETRAINED, max_batch=8, device="cuda", recorder=eager)
    tokens = random_tokens(300, 1, captured.vocab_size)
    ours, end = decode(captured, captured.empty, tokens)
    assert worst(ours, decode(plain, plain.empty, tokens)[0]) <= 1e-4
    assert worst(ours[-1], captured.prefill(tokens)[0]) <= LIMITS["fp32"]
    assert end.position == 300


def test_tf32_turned_on_by_somebody_else_changes_no_bit() -> None:
    tokens = random_tokens(100, 2, runtime().vocab_size)
    logits, state = runtime().prefill(tokens)
    stepped, _ = decode(runtime(), state, [5, 6, 7])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        again, its_state = runtime().prefill(tokens)
        assert np.array_equal(again, logits)
        assert np.array_equal(decode(runtime(), its_state, [5, 6, 7])[0], stepped)
    finally:
        torch.set_float32_matmul_precision(before)


def test_steps_ask_for_no_more_memory() -> None:
    batch = runtime().new_batch()
    for _ in range(64):
        batch.append(runtime().empty)
    runtime().step_in_place(np.full(64, 5), batch)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        runtime().step_in_place(np.full(64, 6), batch)
    assert torch.cuda.memory_allocated() == before


def test_of_many_draws_nearly_all_are_those_of_the_host_and_all_greedy_ones() -> None:
    rng = np.random.default_rng(0)
    differ = 0
    host = SamplingRows(64, 4096)
    device = DeviceSampler(64, 4096, torch.device("cuda", 0), CudaGraphs())
    for row in range(64):
        for sampler in (host, device):
            sampler.set(row, SamplingParams(temperature=row % 4 / 2, top_k=row % 3 * 40, top_p=0.95, seed=row))
    for place in range(100):
        logits_BV = np.stack([some_logits(rng, 4096) for _ in range(64)])
        expected_B, _ = host.sample(logits_BV.copy(), np.full(64, place))
        chosen_B, usable_B = device.sample(DeviceLogits(torch.from_numpy(logits_BV).cuda()), np.full(64, place))
        assert usable_B.all()
        assert np.array_equal(chosen_B[::4], expected_B[::4])  # greedy
        differ += int((chosen_B != expected_B).sum())
    assert differ <= 6


def test_a_seed_gives_the_same_story_alone_and_among_others() -> None:
    asked = [
        GenerationRequest(prompt=f"Tim number {seed}", max_tokens=50 + seed, sampling=SamplingParams(seed=seed))
        for seed in range(64)
    ]
    with Engine(runtime(), StoryTokenizer.load(PRETRAINED / "tokenizer.json")) as engine:
        streams = [engine.submit(each) for each in asked]
        among = ["".join(chunk.text for chunk in stream) for stream in streams]
        alone = ["".join(chunk.text for chunk in engine.submit(each)) for each in asked[:8]]
    assert among[:8] == alone
