from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from model.architecture.checkpoint import load_network, save_network
from model.architecture.config import ModelConfig
from model.architecture.folder import read_config
from model.errors import ModelError
from tests.model.small_model import copy_of, random_network, small_checkpoint, small_tokenizer

CONFIG = ModelConfig(
    vocab_size=40, width=16, pattern="RA", mlp_width=32, heads=2, head_dim=8, key_dim=4, window=8
)


def save(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    network = random_network(CONFIG)
    folder.mkdir(exist_ok=True)
    save_network(
        network, folder, tokenizer=small_tokenizer(), notes={"step": 7, "why": "a test"}, dtype=dtype
    )
    return network.state_dict()


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    weights = save(tmp_path)
    loaded = load_network(tmp_path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_weights_saved_in_half_precision_come_back_as_fp32_of_the_rounded_values(tmp_path: Path) -> None:
    weights = save(tmp_path, torch.float16)
    loaded = load_network(tmp_path).state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert all(torch.equal(value, weights[name].half().float()) for name, value in loaded.items())
    assert any(not torch.equal(value, weights[name]) for name, value in loaded.items())


def test_config_json_holds_the_sizes_and_the_notes(tmp_path: Path) -> None:
    save(tmp_path)
    assert read_config(tmp_path) == {"format": 1, "model": CONFIG.as_dict(), "step": 7, "why": "a test"}


def test_the_tokenizer_goes_along_also_when_it_is_there_already(tmp_path: Path) -> None:
    save(tmp_path)
    own = tmp_path / "tokenizer.json"
    assert own.read_bytes() == small_tokenizer().read_bytes()
    save_network(random_network(CONFIG), tmp_path, tokenizer=own, notes={})
    assert own.read_bytes() == small_tokenizer().read_bytes()


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        save(tmp_path)
    finally:
        os.umask(mask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "tokenizer.json"], "0o644")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_weights_file_is_named(keep: int, tmp_path: Path) -> None:
    folder = copy_of(small_checkpoint(), tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"checkpoint/model\.safetensors cannot be read"):
        load_network(folder)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = copy_of(small_checkpoint(), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"checkpoint/model\.safetensors cannot be read"):
        load_network(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("width", 128), ("pattern", "RARAR"), ("pattern", "RRRR"), ("heads", 4)]
)
def test_weights_of_other_sizes_are_refused(name: str, value: object, tmp_path: Path) -> None:
    folder = copy_of(small_checkpoint(), tmp_path / "checkpoint")
    config = read_config(folder)
    config["model"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"checkpoint: weights and config\.json do not fit: .") as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)
