"""Versions made worse on purpose, and their evidence, measured for real on a small model.

The engine, the requests, the stories and the store are real. What is made worse is made worse where it would be in
life: in the weights, in the decode step, at the door.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments.benchmark.compare import summarise
from experiments.benchmark.evidence import log_benchmark
from experiments.benchmark.plan import Plan
from experiments.benchmark.report import Report, make_report
from experiments.benchmark.run import measure
from experiments.benchmark.targets import Ending, Failed, Listener, LocalTarget
from experiments.common.thresholds import Thresholds, load_thresholds
from experiments.quality.evaluate import evaluate_and_log
from model.architecture.folder import ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.load import load_runtime
from model.generation import GenerationRequest
from model.runtimes.protocol import Logits, Tokens
from model.serving.backend import LocalBackend, ModelInfo
from tests.model.small_model import small_checkpoint
from training.data.corpus import load_own_stories
from training.export.export import export_checkpoint
from training.tracking.provenance import provenance

PLAN = Plan(requests=30, concurrency=4, rate=40.0, max_tokens=12, phases=("single", "concurrent", "open"))
SHORT = PLAN.model_copy(update={"requests": 12, "max_tokens": 8, "phases": ("concurrent", "open")})
"""For a model that takes its time."""
THRESHOLDS = """
thresholds:
  - {metric: avg_generation_time, unit: s, at_most: 1.0, scope: benchmark, reason: small, min_n: 20}
  - {metric: success_rate, unit: share, at_least: 0.80, scope: benchmark, reason: documented, min_n: 30}
  - {metric: error_rate, unit: share, below: 0.50, scope: benchmark, reason: documented, min_n: 20}
  - {metric: concurrent_handling, unit: streams, at_least: 3, scope: benchmark, reason: documented}
  - {metric: bits_per_byte, unit: bits/byte, at_most: 4.0, scope: quality, reason: a small model, min_n: 40}
  - {metric: bits_per_byte_difference, unit: bits/byte, at_most: 0.01, scope: compare, reason: no worse, min_n: 40}
  - {metric: generation_time_ratio, unit: ratio, at_most: 10, scope: compare, reason: no slower, min_n: 5}
"""


def thresholds(folder: Path) -> Thresholds:
    """Bounds that a model of a few thousand parameters can reach; the project's own are for the real one."""
    path = folder / "thresholds.yaml"
    path.write_text(THRESHOLDS)
    return load_thresholds(path)


def noised(target: Path, *, strength: float) -> ModelFolder:
    """The small model with noise on every weight, in proportion to that tensor's own spread."""
    checkpoint = target / "checkpoint"
    shutil.copytree(small_checkpoint(), checkpoint)
    dice = np.random.default_rng(0)
    weights = load_file(checkpoint / "model.safetensors")
    worse = {
        name: (value + strength * value.std() * dice.standard_normal(value.shape)).astype(value.dtype)
        for name, value in weights.items()
    }
    save_file(worse, checkpoint / "model.safetensors")
    export_checkpoint(checkpoint, target / "model")
    return ModelFolder.open(target / "model")


def held_out_file(folder: Path) -> Path:
    """Our own held-out stories, as `story evaluate` reads them."""
    path = folder / "held-out.jsonl"
    lines = [json.dumps({"text": story.text}) for story in load_own_stories("heldout")[:48]]
    path.write_text("\n".join(lines) + "\n")
    return path


def log_quality(uri: str, folder: ModelFolder, stories: Path) -> str:
    """Evaluate for real; returns the run's id."""
    _, logged = evaluate_and_log(
        folder.path, [stories], tracking_uri=uri, runtimes=("int8",), write=False, floor=False
    )
    return logged["run"]


class Slowed:
    """A runtime whose every step takes `delay` seconds longer."""

    def __init__(self, runtime: Any, delay: float) -> None:
        self._runtime, self._delay = runtime, delay

    def __getattr__(self, name: str) -> Any:
        if name in ("step_in_place", "new_sampler", "new_host_sampler"):  # a way past the delay
            raise AttributeError(name)
        return getattr(self._runtime, name)

    def step(self, tokens: Tokens, batch: Any) -> Logits:
        time.sleep(self._delay)
        logits: Logits = self._runtime.step(tokens, batch)
        return logits


class Failing:
    """A target that turns away each third request."""

    def __init__(self, target: LocalTarget) -> None:
        self._target, self._asked = target, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    async def generate(self, request: GenerationRequest, listener: Listener) -> Ending:
        self._asked += 1
        if self._asked % 3 == 0:
            raise Failed("error", "this door is shut")
        return await self._target.generate(request, listener)


def local_target(folder: ModelFolder, delay: float = 0.0) -> LocalTarget:
    runtime: Any = load_runtime(folder, slots=4)
    engine = Engine(Slowed(runtime, delay) if delay else runtime, StoryTokenizer.load(folder.tokenizer))
    backend = LocalBackend(engine, ModelInfo("small", folder.digest), capacity=64)
    return LocalTarget(backend, folder.path)


def log_speed(
    uri: str,
    folder: ModelFolder,
    bounds: Thresholds,
    *,
    against: ModelFolder | None = None,
    delay: float = 0.0,
    failing: bool = False,
    plan: Plan = PLAN,
) -> str:
    """Benchmark for real, and log it; returns the run's id."""
    target: Any = local_target(folder, delay)
    if failing:
        target = Failing(target)
    other = local_target(against) if against is not None else None
    if other is not None:
        plan = plan.model_copy(update={"phases": (*plan.phases, "compare")})

    async def go() -> Sequence[Any]:
        async with target.running():
            if other is None:
                return (await measure(target, plan)).samples
            async with other.running():
                return (await measure(target, plan, against=other)).samples

    began = datetime.now(UTC)
    samples = list(asyncio.run(go()))
    report: Report = make_report(
        samples, target="local", digest=folder.digest, began=began.isoformat(), seconds=1.0, plan=plan,
        cold_start_means="", memory=None, thresholds=bounds, origin=provenance(), load=(0.0, 0.0),
        comparison=summarise(samples, other, seed=0) if other is not None else None,
    )  # fmt: skip
    return log_benchmark(report, samples, uri)
