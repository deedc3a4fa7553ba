"""The engine in this process as a target, and a process of its own for the cold start."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from experiments.benchmark.load.one import Clock, ask
from experiments.benchmark.plan import Plan
from experiments.benchmark.sample import Phase, Sample
from experiments.benchmark.targets.local import LocalTarget
from model.architecture.folder import PRETRAINED, ModelFolder
from model.settings import Settings
from tests.model.serving.http.serving import paced

PLAN = Plan(max_tokens=12)


def rows(
    target: LocalTarget, count: int = 1, *, phase: Phase = "single", timeout: float = 20.0
) -> list[Sample]:
    async def go() -> list[Sample]:
        async with target.running():
            clock = Clock()
            return list(
                await asyncio.gather(
                    *(
                        ask(
                            target,
                            PLAN.request(phase, n),
                            clock,
                            phase=phase,
                            level=1,
                            number=n,
                            timeout=timeout,
                        )
                        for n in range(count)
                    )
                )
            )

    return asyncio.run(go())


def test_tokens_are_counted_as_the_engine_made_them() -> None:
    backend, network = paced(slots=2)
    told = rows(LocalTarget(backend, None), count=2)
    assert [(row.tokens, row.finish, sum(row.counts)) for row in told] == [(12, "length", 12)] * 2
    rows_decoded = sum(size for kind, size in network.calls if kind == "step")
    assert rows_decoded == 2 * 11  # the first token of each comes of its prompt
    assert all(row.started <= row.arrivals[0] <= row.arrivals[-1] <= row.ended for row in told)


def test_a_full_line_is_busy() -> None:
    backend, _ = paced(slots=1, queue=1, step_seconds=0.005)
    errors = [row.error for row in rows(LocalTarget(backend, None), count=5)]
    assert (errors.count("busy"), errors.count(None)) == (3, 2)


def test_a_model_that_fails_is_an_error_and_the_next_story_is_written() -> None:
    backend, network = paced(slots=1)
    network.fail_next = RuntimeError("the device is gone")
    broken, after = rows(LocalTarget(backend, None), count=2)
    assert (broken.error, broken.ok, broken.finish) == ("error", False, "")
    assert broken.message
    assert after.ok


def test_a_request_whose_time_is_up_frees_its_slot() -> None:
    backend, _ = paced(slots=1, step_seconds=0.1)
    (row,) = rows(LocalTarget(backend, None), timeout=0.25)
    assert row.error == "timeout"
    assert row.tokens < 12
    assert backend.engine.stats().active == 0


def test_the_target_is_the_settings_model_and_knows_its_digest() -> None:
    target = LocalTarget.load(Settings())
    assert target.digest == ModelFolder.open(PRETRAINED).digest
    assert target.processes() == [os.getpid()]


def test_a_cold_start_is_a_new_process_up_to_its_first_token() -> None:
    (row,) = rows(LocalTarget.load(Settings()), phase="cold", timeout=60.0)
    assert (row.error, row.tokens, row.message) == (None, 1, "")
    assert row.ttft is not None
    assert row.ttft > 0.2, "importing ONNX Runtime alone takes longer"


def test_a_cold_start_that_fails_says_why(tmp_path: Path) -> None:
    backend, _ = paced()
    (row,) = rows(LocalTarget(backend, tmp_path / "nowhere"), phase="cold", timeout=60.0)
    assert row.error == "error"
    assert "nowhere is not a model folder" in row.message


@pytest.mark.parametrize("phase", ["single", "cold"])
def test_the_same_seed_asks_the_same(phase: Phase) -> None:
    assert PLAN.request(phase, 3) == Plan(max_tokens=12).request(phase, 3)
