from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.architecture.folder import ModelFolder
from model.architecture.network import StoryNetwork, load_network
from model.errors import InputError, ModelError
from tests.model.small_model import small_checkpoint
from tests.training.runs import Recorder
from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, prepare
from training.data.shards import TokenShard, read_meta
from training.export.export import calibrate, export_checkpoint
from training.trainer.parallel import Group
from training.trainer.rows import Validation


@pytest.fixture
def network(whole: tuple[Recorder, Path]) -> StoryNetwork:
    return load_network(whole[1] / "best")


def scaled(network: StoryNetwork, factor: float) -> StoryNetwork:
    with torch.no_grad():
        network.embedding.weight.mul_(factor)
    return network


def bits(network: StoryNetwork, shards: Path, stories: int) -> float:
    tokenizer = Tokenizer.from_file(str(shards / "tokenizer.json"))
    return Validation(TokenShard(shards, "val"), tokenizer, stories, Group()).measure(network)[1]


def test_no_scale_beside_the_one_found_is_better(network: StoryNetwork, shards: Path) -> None:
    before = bits(network, shards, 3)
    found = calibrate(network, shards, shards / "tokenizer.json", stories=3)
    assert found.bits_per_byte_before == pytest.approx(before, rel=1e-6)
    # The norm behind the embedding adds a millionth, which is not quite nothing beside rows this small.
    assert found.bits_per_byte == pytest.approx(bits(network, shards, 3), rel=1e-4)
    assert found.bits_per_byte < before
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert bits(scaled(network, factor), shards, 3) > found.bits_per_byte
        scaled(network, 1 / factor)
    assert (found.stories, found.data) == (3, read_meta(shards)["digest"])


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 2.5])
def test_a_network_that_is_too_sure_or_not_sure_enough_is_brought_back(
    network: StoryNetwork, shards: Path, factor: float
) -> None:
    tokenizer = shards / "tokenizer.json"
    calibrate(network, shards, tokenizer, stories=3)
    found = calibrate(scaled(network, factor), shards, tokenizer, stories=3)
    assert found.scale == pytest.approx(1 / factor, rel=1e-3)


def test_it_scales_the_logits_and_changes_nothing_else(network: StoryNetwork, shards: Path) -> None:
    tokens_BT = torch.randint(1, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(tokens_BT)
        found = calibrate(network, shards, shards / "tokenizer.json", stories=3)
        torch.testing.assert_close(network(tokens_BT), before * found.scale, rtol=1e-3, atol=1e-3)
    assert found.scale != pytest.approx(1.0, abs=0.01)


def test_an_export_can_be_calibrated_and_reports_so(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "model"
    prepare(PrepareOptions(sources=(own_stories_folder(),), out=data, tokenizer=small_checkpoint() / "tokenizer.json"))
    before = (small_checkpoint() / "model.safetensors").read_bytes()
    export_checkpoint(small_checkpoint(), out, calibrate_on=data)
    notes = ModelFolder.open(out).notes["calibration"]
    assert notes["stories"] == len(TokenShard(data, "val"))
    assert notes["bits_per_byte"] < notes["bits_per_byte_before"]
    # Weights are kept in half precision.
    assert bits(load_network(out), data, 0) == pytest.approx(notes["bits_per_byte"], rel=1e-4)
    assert bits(load_network(small_checkpoint()), data, 0) == pytest.approx(notes["bits_per_byte_before"], rel=1e-6)
    assert f"logits scaled by {notes['scale']:.3f}, chosen on the first" in (out / "card.md").read_text("utf-8")
    assert (small_checkpoint() / "model.safetensors").read_bytes() == before, "the checkpoint stays as it is"


# What is refused.


def test_stories_cut_by_another_tokenizer_are_refused(network: StoryNetwork, shards: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((shards / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"].reverse()
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(InputError, match=r"^calibrate has another tokenizer than the checkpoint"):
        calibrate(network, shards, other)


def test_weights_that_are_not_finite_are_refused(network: StoryNetwork, shards: Path) -> None:
    with pytest.raises(ModelError, match="logits that are not finite"):
        calibrate(scaled(network, float("nan")), shards, shards / "tokenizer.json", stories=1)


def test_a_network_that_no_scale_within_reason_mends_is_refused(network: StoryNetwork, shards: Path) -> None:
    with pytest.raises(ModelError, match=r"no scale of the logits between 0.25 and 4 is best"):
        calibrate(scaled(network, 1000.0), shards, shards / "tokenizer.json", stories=1)


def test_a_refused_calibration_leaves_no_folder(shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    with pytest.raises(InputError, match="another tokenizer"):
        export_checkpoint(small_checkpoint(), tmp_path / "out" / "model", calibrate_on=data)
    assert not (tmp_path / "out").exists()
