"""The benchmark against others who saw the same: an independent client beside it, and the server's own times.

The service is real, under uvicorn on loopback; its network keeps a pace, because two clients in one process, on a
machine that is busy with other tests, otherwise measure each other.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from experiments.benchmark.load.closed_loop import closed_loop
from experiments.benchmark.load.one import Clock
from experiments.benchmark.measures import phase_figures
from experiments.benchmark.plan import Plan
from experiments.benchmark.sample import Sample
from experiments.benchmark.targets.web import WebTarget
from model.backend import LocalBackend
from model.runtime import Logits, Tokens
from tests.experiments.benchmark import independent
from tests.model.engines import engine, runtime
from tests.model.fake_runtime import FakeBatch, FakeRuntime
from tests.model.service.serving import paced, serving

STEP = 0.025
WITHIN = 0.05


def run_loop(url: str, plan: Plan, readers: int, start: Callable[[], None] = lambda: None) -> list[Sample]:
    """The rows of a closed loop after a warm-up; `start` is called between the two."""

    async def go() -> list[Sample]:
        target = WebTarget(url)
        async with target.running():
            warm = dataclasses.replace(plan, max_tokens=5)
            await closed_loop(target, warm, Clock(), phase="warmup", readers=readers, requests=readers)
            start()
            return await closed_loop(target, plan, Clock(), phase="concurrent", readers=readers)

    return asyncio.run(go())


def test_it_agrees_with_an_independent_client_on_the_same_run_within_5_percent() -> None:
    """Both ask the same server at the same time, so that both see the same steps."""
    backend, _ = paced(slots=4, queue=8, step_seconds=STEP)
    others: dict[str, float] = {}
    with serving(backend) as running:
        independent.load(running.url, requests=2, readers=2, max_tokens=5)  # its code made warm too

        def other() -> None:
            others.update(independent.load(running.url, requests=6, readers=2, max_tokens=50))

        thread = threading.Thread(target=other)
        samples = run_loop(running.url, Plan(requests=6, max_tokens=50), readers=2, start=thread.start)
        thread.join()
    ours = {name: fig.value for name, fig in phase_figures(samples, ttft_limit=9, itl_limit=9).items()}
    assert all(sample.ok for sample in samples)
    assert sum(sample.tokens for sample in samples) == others.pop("tokens") == 6 * 50
    for name in ("avg_generation_time", "itl_p50", "tokens_per_second", "total_tokens_per_second"):
        assert ours[name] == pytest.approx(others[name], rel=WITHIN), name
    # The first token is less than one step away; when in a step a request comes is another moment for each.
    assert ours["ttft_p50"] == pytest.approx(others["ttft_p50"], abs=STEP)
    assert ours["itl_p50"] == pytest.approx(STEP, rel=0.2)


class Noted(FakeRuntime):
    """Notes when each of its steps was done."""

    stepped: list[float]

    def step(self, tokens: Tokens, batch: FakeBatch) -> Logits:
        logits = super().step(tokens, batch)
        self.stepped.append(time.perf_counter())
        return logits


def test_it_agrees_with_the_times_at_which_the_server_made_its_tokens() -> None:
    base = runtime()
    network = Noted(base.vocab_size, max_batch=1, step_seconds=STEP, end_bias=-1000.0)
    network.stepped = []
    model = paced()[0].model
    with serving(LocalBackend(engine(network, queue_limit=4), model, capacity=5)) as running:
        run = Plan(requests=2, max_tokens=30)
        samples = run_loop(running.url, run, readers=1, start=network.stepped.clear)
    # The first token of each story comes of the prompt, the others of a step each.
    made = [network.stepped[start : start + 29] for start in range(0, len(network.stepped), 29)]
    for sample, steps in zip(samples, made, strict=True):
        assert (sample.tokens, sample.finish, len(steps)) == (30, "length", 29)
        theirs = [after - before for before, after in pairwise(steps)]
        # Messages that met on their way have no gap between them; the sum has to be right in any case.
        assert sum(sample.gaps[1:]) == pytest.approx(sum(theirs), rel=WITHIN)
        assert independent.middle(sample.gaps) == pytest.approx(independent.middle(theirs), rel=WITHIN)
