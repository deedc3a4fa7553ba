"""The benchmark against others who saw the same: an independent client beside it, and the server's own times.

The service is real, under uvicorn on loopback; its network keeps a pace, because two clients in one process otherwise
measure each other. On a machine that does nothing else: what else it does may hold up one of them and not the other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from experiments.benchmark.load import LoadGenerator, Plan
from experiments.benchmark.measures import Sample, phase_figures
from experiments.benchmark.targets import WebTarget
from model.runtimes.protocol import Logits, Tokens
from model.serving.backend import LocalBackend
from tests.experiments.benchmark import independent
from tests.model.engines import engine, runtime
from tests.model.fake_runtime import FakeBatch, FakeRuntime
from tests.model.serving.http.serving import paced, serving

STEP = 0.04
WITHIN = 0.05


def run_loop(url: str, plan: Plan, clients: int, start: Callable[[], None] = lambda: None) -> list[Sample]:
    """The rows of a closed loop after a warm-up; `start` is called between the two."""

    async def go() -> list[Sample]:
        target = WebTarget(url)
        async with target.running():
            warm = plan.model_copy(update={"max_tokens": 5})
            await LoadGenerator(warm).closed_loop(target, "warmup", clients, requests=clients)
            start()
            return await LoadGenerator(plan).closed_loop(target, "concurrent", clients)

    return asyncio.run(go())


@pytest.mark.slow
def test_it_agrees_with_an_independent_client_on_the_same_run_within_5_percent() -> None:
    """Both ask the same server at the same time, so that both see the same steps."""
    backend, _ = paced(slots=4, queue=8, step_seconds=STEP)
    with serving(backend) as running:
        independent.load(running.url, requests=2, clients=2, max_tokens=5)  # its code made warm too
        apart = one_run(running.url)
    assert max(apart.values()) <= WITHIN, apart


def one_run(url: str) -> dict[str, float]:
    """How far apart both clients' figures are, as shares; the first token's in stories."""
    others: dict[str, float] = {}

    def other() -> None:
        others.update(independent.load(url, requests=4, clients=2, max_tokens=40))

    thread = threading.Thread(target=other)
    samples = run_loop(url, Plan(requests=4, max_tokens=40), clients=2, start=thread.start)
    thread.join()
    ours = {name: fig.value for name, fig in phase_figures(samples, ttft_limit=9, itl_limit=9).items()}
    assert all(sample.ok for sample in samples)
    assert sum(sample.tokens for sample in samples) == others["tokens"] == 4 * 40
    assert ours["itl_p50"] >= STEP * 0.9
    names = ("avg_generation_time", "itl_p50", "tokens_per_second", "total_tokens_per_second")
    apart = {name: abs(ours[name] / others[name] - 1) for name in names}
    apart["ttft_p50"] = abs(ours["ttft_p50"] - others["ttft_p50"]) / others["avg_generation_time"]
    return apart


class Recording(FakeRuntime):
    """Notes when each of its steps was done."""

    stepped: list[float]

    def step(self, tokens: Tokens, batch: FakeBatch) -> Logits:
        logits = super().step(tokens, batch)
        self.stepped.append(time.perf_counter())
        return logits


@pytest.mark.slow
def test_it_agrees_with_the_times_at_which_the_server_made_its_tokens() -> None:
    base = runtime()
    network = Recording(base.vocab_size, max_batch=1, step_seconds=STEP, end_bias=-1000.0)
    network.stepped = []
    model = paced()[0].model
    with serving(LocalBackend(engine(network, queue_limit=4), model, capacity=5)) as running:
        run = Plan(requests=2, max_tokens=30)
        samples = run_loop(running.url, run, clients=1, start=network.stepped.clear)
    # The first token of each story comes of the prompt, the others of a step each.
    made = [network.stepped[start : start + 29] for start in range(0, len(network.stepped), 29)]
    for sample, steps in zip(samples, made, strict=True):
        assert (sample.tokens, sample.finish, len(steps)) == (30, "length", 29)
        theirs = [after - before for before, after in pairwise(steps)]
        # Each token's way to us takes as long as the next one's, but for what else the machine does.
        assert sum(sample.gaps[1:]) == pytest.approx(sum(theirs), rel=WITHIN)
        assert independent.middle(sample.gaps) == pytest.approx(independent.middle(theirs), rel=WITHIN)
