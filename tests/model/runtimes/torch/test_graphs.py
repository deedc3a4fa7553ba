"""Recording and replaying: which launches cover a batch, and what a recorded step must not depend on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.runtimes.torch.forward import WARM_UPS, CudaGraphs, bucket_sizes, cover, exact_products
from model.runtimes.torch.runtime import TorchRuntime
from tests.model.runtimes.shared import decode, network_in, random_tokens, small
from tests.model.runtimes.torch.tape import Tapes
from tests.model.small_model import small_folder


@given(st.integers(1, 300))
def test_buckets_are_powers_of_two_up_to_the_capacity_that_is_needed(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes == [2**power for power in range(len(sizes))]
    assert sizes[-1] >= most
    assert sizes[-1] < 2 * most


@given(st.integers(1, 64), st.sets(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1))
def test_launches_cover_all_rows_once_within_the_capacity_and_as_few_as_can_be(count: int, some: set[int]) -> None:
    sizes = sorted(some)
    launches = cover(count, sizes)
    rows = [row for first, size in launches for row in range(first, first + size)]
    most = max(64, *sizes)
    assert rows == list(range(len(rows)))
    assert count <= len(rows) <= most
    assert len(launches) == -(-count // sizes[-1])
    assert {size for _, size in launches} <= some
    assert len(rows) - count < launches[-1][1]


def test_a_tape_repeats_operations_and_not_the_program() -> None:
    """The stand-in itself: a number that the host changes is not seen again, memory that changes is."""
    memory, out, factor = torch.ones(3), torch.zeros(3), [2.0]

    def work() -> None:
        out.copy_((memory * factor[0])[1:].sum().expand(3))

    def asking() -> None:
        out.fill_(float(memory[0]))

    launch = Tapes()(work)
    memory += 1
    factor[0] = 100.0
    launch()
    assert out.tolist() == [8.0, 8.0, 8.0]
    with pytest.raises(AssertionError, match="asks the device for a value"):
        Tapes()(asking)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=3)
def test_a_replayed_step_is_the_step_whatever_comes_and_goes(seed: int) -> None:
    tapes = Tapes()
    taped, plain = TorchRuntime(network_in(small_folder()), max_batch=8, recorder=tapes), small("torch")
    assert taped.sizes == plain.sizes
    recorded, rng = tapes.recorded, np.random.default_rng(seed)
    states = [plain.prefill(random_tokens(4 + 5 * stream, stream))[1] for stream in range(8)]
    batches = taped.new_batch(), plain.new_batch()
    for step in range(40):
        size = len(batches[0])
        if size < 8 and (not size or rng.random() < 0.4):
            chosen = states[rng.integers(8)]
            for batch in batches:
                batch.append(chosen)
        elif rng.random() < 0.2:
            row = int(rng.integers(size))
            for batch in batches:
                batch.remove(row)
        fed = rng.integers(0, 300, len(batches[0])) if step % 7 else np.zeros(len(batches[0]), np.int64)
        before = tapes.replays.total()
        ours = taped.step(fed, batches[0])
        assert np.array_equal(ours, plain.step(fed, batches[1]))
        assert tapes.replays.total() - before == min(len(fed), 1)  # one launch, however many rows
    assert tapes.recorded == recorded  # nothing is captured while stories are written


def test_every_launch_that_a_batch_can_ask_for_is_recorded_when_the_runtime_is_made() -> None:
    tapes = Tapes()
    runtime = TorchRuntime(network_in(small_folder()), max_batch=20, recorder=tapes)
    assert tapes.recorded == len(bucket_sizes(20))
    batch = runtime.new_batch()
    used = set()
    for _ in range(20):
        batch.append(runtime.empty)
        before = tapes.replays.copy()
        runtime.step(np.full(len(batch), 7), batch)
        used |= set(tapes.replays - before)
    assert len(used) == len(runtime.sizes)
    assert tapes.recorded == len(bucket_sizes(20))


def test_a_replay_costs_the_smallest_number_of_rows_that_will_do() -> None:
    tapes = Tapes()
    runtime = TorchRuntime(network_in(small_folder()), max_batch=20, recorder=tapes)
    numbers = {size: number for number, size in enumerate(bucket_sizes(20))}  # recorded in this order
    batch = runtime.new_batch()
    for count in range(1, 21):
        batch.append(runtime.empty)
        before = tapes.replays.copy()
        runtime.step(np.full(count, 7), batch)
        expected = next(size for size in runtime.sizes if size >= count)
        assert dict(tapes.replays - before) == {numbers[expected]: 1}


def test_what_warm_ups_leave_behind_is_cleared() -> None:
    runtime = TorchRuntime(network_in(small_folder()), max_batch=4, recorder=Tapes())
    batch = runtime.new_batch()
    buffers = batch.arena.buffers
    assert not any(part.any() for part in (buffers.conv_RBKM, buffers.memory_RBHNP, buffers.ring_ABWP))
    tokens = random_tokens(10, 0)
    assert np.array_equal(
        decode(runtime, runtime.empty, tokens)[0], decode(small("torch"), small("torch").empty, tokens)[0]
    )


def test_a_capture_is_warmed_up_on_its_own_stream_and_shares_the_memory_of_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA is replaced by what writes down the calls, under the real signature of `torch.cuda.graph`: the order of
    waiting, warming up and capturing is what can be checked of it without a GPU.
    """
    log = list[str]()
    signature = inspect.signature(torch.cuda.graph)

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

        def pool(self) -> str:
            return "the pool"

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append("off")

    @contextmanager
    def capture(*args: Any, **kwargs: Any) -> Iterator[None]:
        asked = signature.bind(*args, **kwargs).arguments
        assert isinstance(asked["cuda_graph"], Graph)
        log.append(f"capture on {asked['stream'].name} in {asked['pool']}, {asked['capture_error_mode']}")
        yield
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("here"))

    def work() -> None:
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        log.append("work")

    recorder = CudaGraphs()
    for pool in ("None", "the pool"):
        log.clear()
        launch = recorder(work)
        assert log == [
            "side waits for here",
            "on side",
            *["work"] * WARM_UPS,
            "off",
            "here waits for side",
            f"capture on side in {pool}, thread_local",
            "work",
            "captured",
        ]
    log.clear()
    launch()
    assert log == ["replay"]


def test_exact_products_are_put_back_to_what_they_were() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with exact_products():
            assert products.fp32_precision == "ieee"
        with pytest.raises(ZeroDivisionError), exact_products():
            _ = 1 // 0
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
