from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from model.architecture.checkpoint import load_network, save_network
from model.architecture.folder import ModelFolder
from model.errors import InputError, ModelError
from tests.model.small_model import SMALL, random_network, small_checkpoint, small_folder, small_tokenizer
from training.export.export import blend, export_checkpoint


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint of the same sizes and tokenizer, with other weights."""
    folder = tmp_path / "other"
    folder.mkdir()
    save_network(random_network(SMALL, seed=5), folder, tokenizer=small_tokenizer(), notes={})
    return folder


def test_the_weights_become_the_mean_of_both(other: Path) -> None:
    network = load_network(small_checkpoint())
    blend(network, other, small_tokenizer())
    first, second = load_network(small_checkpoint()).state_dict(), load_network(other).state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_a_model_blended_with_itself_stays_what_it_is() -> None:
    network = load_network(small_checkpoint())
    blend(network, small_checkpoint(), small_tokenizer())
    for name, value in load_network(small_checkpoint()).state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_an_export_tells_whose_weights_were_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "model"
    export_checkpoint(small_checkpoint(), out, blend_with=small_folder())
    digest = ModelFolder.open(small_folder()).digest
    assert ModelFolder.open(out).notes["blend"] == {"share": 0.5, "digest": digest}
    assert f"the mean of these weights and, to 50%, those of `{digest[:12]}`" in (out / "card.md").read_text(
        "utf-8"
    )
    assert "blend" not in ModelFolder.open(small_folder()).notes


def test_a_model_of_other_sizes_is_refused(other: Path) -> None:
    network = random_network(dataclasses.replace(SMALL, mlp_width=64))
    with pytest.raises(InputError, match=r"^blend has model\.mlp_width = 128 \(.*\), and not 64$"):
        blend(network, other, small_tokenizer())


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        blend(load_network(small_checkpoint()), tmp_path / "nothing", small_tokenizer())
