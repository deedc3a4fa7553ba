"""The PyTorch runtime's figures: every candidate is run, and draws are compared."""

from __future__ import annotations

import pytest
import torch

from experiments.studies.torch_speed import main, sampler_agreement, step_times
from model.runtimes.torch.runtime import DeviceRuntime
from tests.model.small_model import SMALL, random_network, small_folder


def test_each_candidate_has_a_time() -> None:
    times = step_times(random_network(SMALL), 3, rounds=1)
    assert len(times) == 4
    assert all(0 < milliseconds < 10_000 for milliseconds in times.values())


def test_a_sampler_that_differs_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = DeviceRuntime(random_network(SMALL), max_batch=4)
    compared, differ = sampler_agreement(runtime, 400)
    assert compared == 400
    assert differ <= 1
    monkeypatch.setattr("model.runtimes.torch.sampling.uniform", lambda start, _: torch.zeros(len(start)).double())
    _, differ = sampler_agreement(DeviceRuntime(random_network(SMALL), max_batch=4), 400)
    assert differ > 40


def test_the_report_names_streams_sizes_and_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--model", str(small_folder()), "--streams", "2", "--rounds", "1", "--draws", "300"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.count("   2 streams") == 4
    assert "rows are computed in" in printed
    assert "of 320 draws differ" in printed
