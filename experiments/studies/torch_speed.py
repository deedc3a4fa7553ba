"""What the PyTorch runtime gains over the network's own step, and how far its two samplers agree.

    python -m experiments.studies.torch_speed
    python -m experiments.studies.torch_speed --device cuda --streams 1 16 64 256 --rounds 9

A step is timed with its logits on the host, and with its token sampled on the device; candidates take turns, round by
round, and the median counts. On a CPU it is processor time, so that other work on the machine matters less; on a GPU it
is wall-clock time, and the device is waited for. Samplers are compared on random logits under settings of every kind,
given the same random numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from model.architecture.checkpoint import load_network
from model.architecture.folder import PRETRAINED
from model.architecture.network import StoryNetwork
from model.generation import SamplingParams
from model.runtimes.sampling import SamplingRows
from model.runtimes.torch.runtime import DeviceRuntime
from model.runtimes.torch.sampling import DeviceLogits

STEPS = 20
"""Steps of one candidate in one round."""


def step_times(network: StoryNetwork, streams: int, *, device: str = "cpu", rounds: int = 5) -> dict[str, float]:
    """Return milliseconds a step of `streams` streams, by candidate; the network's own step is on the same device."""
    runtime = DeviceRuntime(network, max_batch=streams, device=device)
    here = network.to(runtime.device)
    batch = runtime.new_batch()
    for _ in range(streams):
        batch.append(runtime.empty)
    state = here.initial_state(streams)
    tokens = np.arange(1, streams + 1)
    host, on_device = SamplingRows(streams, runtime.vocab_size), runtime.new_sampler(streams)
    for row in range(streams):
        host.set(row, SamplingParams(seed=row))
        on_device.set(row, SamplingParams(seed=row))
    position = np.full(streams, 1)

    def own_step() -> None:
        nonlocal state
        with torch.no_grad():
            logits, state = here.step(torch.from_numpy(tokens).to(runtime.device), state)
        logits.numpy(force=True)

    candidates: dict[str, Callable[[], object]] = {
        "StoryNetwork.step": own_step,
        "runtime": lambda: runtime.step(tokens, batch),
        "runtime, sampled on the host": lambda: host.sample(runtime.step(tokens, batch), position),
        "runtime, sampled in place": lambda: on_device.sample(runtime.step_in_place(tokens, batch), position),
    }
    clock = time.perf_counter if device == "cuda" else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):  # the first round warms up and is dropped
        for name, run in candidates.items():
            start = clock()
            for _ in range(STEPS):
                run()
            if number:
                taken[name].append((clock() - start) / STEPS * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def sampler_agreement(runtime: DeviceRuntime, draws: int) -> tuple[int, int]:
    """Return (draws compared, draws in which host and device sampled different tokens)."""
    rng = np.random.default_rng(0)
    rows, vocab = runtime.max_batch, runtime.vocab_size
    host, on_device = SamplingRows(rows, vocab), runtime.new_sampler(rows)
    compared = differ = 0
    while compared < draws:
        for row in range(rows):
            sampling = SamplingParams(
                temperature=float(rng.choice([0.3, 0.7, 1, 2])),
                top_k=int(rng.choice([0, 0, 1, 3, 50, 200])),
                top_p=float(rng.choice([1, 0.95, 0.999, 0.5])),
                min_p=float(rng.choice([0, 0, 0.02, 0.3])),
                repetition_penalty=float(rng.choice([1, 1, 1.3])),
                seed=int(rng.integers(2**63 - 1)),
            )
            host.set(row, sampling, range(row))
            on_device.set(row, sampling, range(row))
        for _ in range(20):
            scale = rng.choice([0.1, 1, 3, 8], (rows, 1))
            logits_BV = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
            position_B = rng.integers(0, 10_000, rows)
            moved = DeviceLogits(torch.from_numpy(logits_BV).to(runtime.device))
            ours, _ = on_device.sample(moved, position_B)
            theirs, _ = host.sample(logits_BV, position_B)
            compared += rows
            differ += int((ours != theirs).sum())
    return compared, differ


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PRETRAINED, help="model folder (default: the shipped one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64], help="streams in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--draws", type=int, default=20_000, help="draws in which samplers are compared")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for streams in chosen.streams:
        network = load_network(chosen.model)
        times = step_times(network, streams, device=chosen.device, rounds=chosen.rounds)
        for name, milliseconds in times.items():
            print(f"{streams:4d} streams  {name:30} {milliseconds:8.2f} ms  {streams / milliseconds * 1e3:9,.0f} tok/s")
    runtime = DeviceRuntime.load(chosen.model, max_batch=16, device=chosen.device)
    print(f"rows are computed in {', '.join(map(str, runtime.sizes))}")
    compared, differ = sampler_agreement(runtime, chosen.draws)
    print(f"samplers: {differ} of {compared} draws differ")


if __name__ == "__main__":
    main()
