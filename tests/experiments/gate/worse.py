"""Versions made worse on purpose, and their evidence.

The quality of a small model is measured for real. Its speed is that of a target with a pace, in virtual time: the gate
judges what a benchmark logged, and must judge it the same on any machine.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments.benchmark.evidence import log_benchmark
from experiments.benchmark.load import Plan
from experiments.benchmark.report import Report, make_report, summarise
from experiments.benchmark.run import measure
from experiments.common.thresholds import Thresholds, load_thresholds
from experiments.quality.evaluate import evaluate_and_log
from model.architecture.folder import ModelFolder
from tests import virtual_time
from tests.experiments.benchmark.paced import Paced
from tests.model.small_model import small_checkpoint
from training.data.corpus import load_own_stories
from training.export.export import export_checkpoint
from training.tracking.provenance import provenance

PLAN = Plan(requests=30, concurrency=4, rate=40.0, max_tokens=12, phases=("single", "concurrent", "open"))
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
    rng = np.random.default_rng(0)
    weights = load_file(checkpoint / "model.safetensors")
    worse = {
        name: (value + strength * value.std() * rng.standard_normal(value.shape)).astype(value.dtype)
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
        folder.path, [stories], tracking_uri=uri, runtimes=("int8",), write=False, baseline=False
    )
    return logged["run"]


STEP = 0.01
"""Seconds a token of the small model, as its speed is logged."""


def log_speed(
    uri: str,
    folder: ModelFolder,
    bounds: Thresholds,
    *,
    against: ModelFolder | None = None,
    delay: float = 0.0,
    failing: bool = False,
) -> str:
    """Log the benchmark of a target that keeps its pace in virtual time; returns the run's id.

    `delay`: seconds a token more. `failing`: it turns away each third request.
    """
    target = Paced(STEP + delay, digest=folder.digest, tokens=PLAN.max_tokens, every=3 if failing else 0)
    other, plan = None, PLAN
    if against is not None:
        other = Paced(STEP, digest=against.digest, tokens=PLAN.max_tokens)
        plan = PLAN.model_copy(update={"phases": (*PLAN.phases, "compare")})
    began = datetime.now(UTC)
    samples, memory = virtual_time.run(measure(target, plan, against=other))
    report: Report = make_report(
        samples,
        target="local",
        digest=folder.digest,
        began=began.isoformat(),
        seconds=1.0,
        plan=plan,
        cold_start_means="",
        memory=memory,
        thresholds=bounds,
        origin=provenance(),
        load=(0.0, 0.0),
        comparison=summarise(samples, other, seed=0) if other is not None else None,
    )
    return log_benchmark(report, samples, uri)
