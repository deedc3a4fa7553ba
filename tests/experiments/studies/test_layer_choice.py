"""The candidates of the layer comparison are what they claim to be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.studies import layer_choice
from experiments.studies.layer_choice import CANDIDATES, build, decode_rate
from experiments.studies.rglru import Rglru
from model.architecture.config import ModelConfig
from model.architecture.network import StoryNetwork
from training.data.prepare import PrepareOptions, prepare


def filled(network: StoryNetwork) -> StoryNetwork:
    """All zero-initialised weights made random, so that every path carries signal."""
    for parameter in network.parameters():
        if not parameter.abs().sum():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("candidate", sorted(CANDIDATES))
def test_candidates_have_like_size(candidate: str) -> None:
    network, _ = build(candidate)
    ours, _ = build("hybrid-ssd")
    assert network.parameter_count() == pytest.approx(ours.parameter_count(), rel=0.02)


@pytest.mark.parametrize("time", [1, 31, 32, 33, 70])
def test_rglru_steps_to_what_its_scan_computes(time: int) -> None:
    torch.manual_seed(0)
    network = StoryNetwork(ModelConfig(vocab_size=64, pattern="RA", width=32, mlp_width=32, heads=2, head_dim=16))
    network.blocks[0].mixer = Rglru(network.config, channels=64)
    filled(network)
    tokens = torch.randint(1, 64, (2, time))
    tokens[:, 0] = 0
    tokens[0, time // 2] = 0  # a second story in the first row
    state, steps = network.initial_state(2), []
    with torch.no_grad():
        whole = network(tokens)
        for place in range(time):
            logits, state = network.step(tokens[:, place], state)
            steps.append(logits)
    assert torch.allclose(whole, torch.stack(steps, dim=1), atol=1e-4)


def test_a_candidate_learns_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path with a network of a few thousand weights; the real sizes take minutes."""
    stories = Path(layer_choice.__file__).resolve().parents[2] / "training" / "stories"
    prepare(PrepareOptions(sources=(stories,), out=tmp_path / "data", vocab_size=512, val_fraction=0.1))
    small = ModelConfig(vocab_size=512, pattern="RA", width=32, mlp_width=32, heads=2, head_dim=16, key_dim=8)
    real_build = layer_choice.build

    def build_small(candidate: str) -> tuple[StoryNetwork, object]:
        torch.manual_seed(0)
        return StoryNetwork(small), real_build(candidate)[1]

    monkeypatch.setattr(layer_choice, "build", build_small)
    short, long = (
        layer_choice.train("hybrid-ssd", tmp_path / "data", seconds, 5, compiled=False) for seconds in (0.01, 1.0)
    )
    assert long.steps > short.steps >= 1
    assert long.bits_per_byte < short.bits_per_byte
    assert set(dataclasses.asdict(long)["decode_tokens_per_cpu_second"]) == {1, 16}


def test_decode_rate_counts_all_streams() -> None:
    network, _ = build("transformer")
    assert decode_rate(network.eval(), 2, steps=2) > 0
