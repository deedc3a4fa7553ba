"""Stories from the engine over PyTorch, with tokens chosen on the host and on the device."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.architecture.folder import ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.load import load_torch_engine, load_torch_runtime
from model.errors import ModelError
from model.generation import Completion, GenerationRequest, SamplingParams
from model.runtimes.protocol import Runtime, SamplingRuntime
from model.runtimes.sampling import SamplingRows, log_probabilities
from model.runtimes.torch.runtime import DeviceRuntime, TorchRuntime
from model.runtimes.torch.sampling import DeviceLogits
from tests.model.runtimes.shared import network_in, small
from tests.model.runtimes.torch.tape import Tapes
from tests.model.small_model import small_folder, small_tokenizer

SEEDS = range(6)


@cache
def device_runtime() -> DeviceRuntime:
    """Samples as on a GPU, and replays what was recorded."""
    return DeviceRuntime(network_in(small_folder()), max_batch=8, recorder=Tapes())


def engine(runtime: Runtime) -> Engine:
    return Engine(runtime, StoryTokenizer.load(small_tokenizer()))


def request(seed: int, **options: Any) -> GenerationRequest:
    sampling = SamplingParams(seed=seed, temperature=0.8, repetition_penalty=1.0 + 0.1 * (seed % 3))
    defaults: dict[str, Any] = {"prompt": f"Once upon a time {seed}", "max_tokens": 12, "sampling": sampling}
    return GenerationRequest(**defaults | options)


def stories(runtime: Runtime, *requests: GenerationRequest) -> list[Completion]:
    """All generated side by side."""
    with engine(runtime) as running:
        streams = [running.submit(each) for each in requests]
        return [stream.wait() for stream in streams]


@pytest.mark.parametrize("runtime", [partial(small, "torch"), device_runtime])
def test_a_seed_gives_the_same_story_alone_and_among_others(runtime: Any) -> None:
    among = stories(runtime(), *(request(seed, max_tokens=8 + seed) for seed in SEEDS))
    alone = [stories(runtime(), request(seed, max_tokens=8 + seed))[0] for seed in SEEDS]
    assert [each.text for each in among] == [each.text for each in alone]
    assert {each.finish_reason for each in among} <= {"stop", "length"}
    assert len({each.text for each in among}) == len(SEEDS)


def test_where_tokens_are_chosen_does_not_show_in_the_story() -> None:
    on_host = stories(small("torch"), *map(request, SEEDS))
    on_device = stories(device_runtime(), *map(request, SEEDS))
    assert [each.text for each in on_device] == [each.text for each in on_host]


def test_greedy_stories_are_those_of_the_embedded_runtime() -> None:
    greedy = [request(seed, sampling=SamplingParams(temperature=0)) for seed in SEEDS]
    expected = [each.text for each in stories(small("fp32"), *greedy)]
    assert [each.text for each in stories(device_runtime(), *greedy)] == expected


def test_logits_leave_the_device_only_for_streams_that_asked_for_log_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched = list[int]()
    fetch = DeviceLogits.__getitem__

    def counted(self: DeviceLogits, row: int) -> Any:
        fetched.append(row)
        return fetch(self, row)

    monkeypatch.setattr(DeviceLogits, "__getitem__", counted)
    stories(device_runtime(), *map(request, SEEDS))
    assert fetched == []
    found, _ = stories(device_runtime(), request(1, logprobs=2), request(2))
    assert len(fetched) == len(found.logprobs) - 1  # the first token's come with the prompt
    # The same ones, from the runtime by hand.
    runtime, tokenizer = small("torch"), StoryTokenizer.load(small_tokenizer())
    logits, state = runtime.prefill([0, *tokenizer.encode("Once upon a time 1")])
    batch = runtime.new_batch()
    batch.append(state)
    for entry in found.logprobs:
        ((own, best),) = log_probabilities(logits[None], [entry.token], 2)
        assert entry.logprob == pytest.approx(own, abs=1e-4)
        assert [token for token, _, _ in entry.alternatives] == [token for token, _ in best]
        logits = runtime.step(np.array([entry.token]), batch)[0]


def test_a_runtime_that_samples_is_asked_to_and_another_is_not() -> None:
    assert isinstance(device_runtime(), SamplingRuntime)
    assert not isinstance(small("torch"), SamplingRuntime)
    assert not isinstance(small("fp32"), SamplingRuntime)


def test_a_step_that_fails_ends_its_stories_and_the_next_ones_are_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = device_runtime()
    expected = stories(runtime, request(4))[0].text
    step, calls = runtime.step_in_place, itertools.count()

    def failing(*given: Any) -> DeviceLogits:
        if next(calls) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step(*given)

    monkeypatch.setattr(runtime, "step_in_place", failing)
    with engine(runtime) as running:
        broken = running.submit(request(4))
        assert "".join(chunk.text for chunk in broken) == expected[: len(broken.completion.text)]
        assert broken.completion.finish_reason == "error"
        assert "illegal" not in (broken.completion.error or "")
        assert "".join(chunk.text for chunk in running.submit(request(4))) == expected


# From a folder


def test_the_engine_is_loaded_from_a_folder_for_a_device() -> None:
    with load_torch_engine(small_folder(), slots=3, device="cpu", queue_limit=5) as running:
        stats = running.stats()
        assert (stats.slots, stats.queue_limit) == (3, 5)
        text = "".join(chunk.text for chunk in running.submit(request(2)))
    assert text == stories(small("torch"), request(2))[0].text
    runtime = load_torch_runtime(ModelFolder.open(small_folder()), slots=2, device="cpu")
    assert (type(runtime), runtime.max_batch) == (TorchRuntime, 2)


def test_a_device_that_is_not_there_is_named_before_anything_is_read() -> None:
    opened = ModelFolder.open(small_folder())
    with pytest.raises(ModelError, match="device must be cpu or cuda, got 'metal'"):
        load_torch_runtime(opened, device="metal")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device cuda is not there"):
            load_torch_engine(small_folder())


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as where it is not installed
from model.errors import ModelError
from model.engine.load import load_torch_engine
try:
    load_torch_engine(device="cuda")
except ModelError as error:
    print(error)
"""


def test_without_torch_installed_the_message_says_so(repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "writing on cuda needs PyTorch and safetensors, and torch is missing", run.stderr


def test_the_host_samples_for_a_runtime_on_the_cpu() -> None:
    """There its sampler is many times faster than the device's."""
    assert isinstance(small("torch"), TorchRuntime)
    assert not hasattr(small("torch"), "new_sampler")
    rows = SamplingRows(1, small("torch").vocab_size)
    rows.set(0, SamplingParams(temperature=0))
    logits, _ = small("torch").prefill([0, 5])
    assert rows.sample(logits[None], np.array([2]))[0][0] == logits.argmax()
