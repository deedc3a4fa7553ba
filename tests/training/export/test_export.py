"""Exported model folders: whole, accepted and described; weights can be blended first."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import training.export.export
from model.architecture.folder import END_ID, FILES, PRETRAINED, ModelFolder, compute_digest
from model.architecture.network import StoryNetwork, load_network, save_network
from model.errors import InputError, ModelError
from tests.model.small_model import SMALL, copy_of, random_network, small_checkpoint, small_folder, small_tokenizer
from tests.training.runs import MODEL, smallest
from training.export.export import Acceptance, blend, export_checkpoint, history, write_card
from training.trainer.recipe import load_recipe


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A checkpoint with one weight that is not finite: its export fails late, after files were written."""
    folder = copy_of(small_checkpoint(), tmp_path / "broken")
    network = load_network(folder)
    with torch.no_grad():
        network.get_parameter("blocks.1.down.weight")[0, 0] = torch.inf
    save_network(network, folder, tokenizer=small_tokenizer(), notes={})
    return folder


def test_an_export_is_whole_accepted_and_reported(tmp_path: Path) -> None:
    report = export_checkpoint(small_checkpoint(), tmp_path / "deep" / "model")
    out = tmp_path / "deep" / "model"
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert list(out.parent.iterdir()) == [out]
    assert ModelFolder.open(out).digest == report.digest == compute_digest(out)
    notes = json.loads(json.dumps(dataclasses.asdict(report)))
    assert notes["folder"] == str(out)
    assert notes["parameters"] == load_network(small_checkpoint()).parameter_count()
    assert notes["bytes"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert [entry["precision"] for entry in notes["acceptance"]] == ["int8", "fp32"]
    assert all(list(entry["largest"]) == ["1", "2", "3", "8", "16", "32", "64"] for entry in notes["acceptance"])


def test_the_tokenizer_of_transformers_finds_its_class_and_the_end_of_story() -> None:
    """Checked with transformers 5.24 itself: its ids are those of `StoryTokenizer` for all stories that ship."""
    config = json.loads((small_folder() / "tokenizer_config.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_file(str(small_folder() / "tokenizer.json"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer.token_to_id(config["eos_token"]) == tokenizer.token_to_id(config["bos_token"]) == END_ID
    assert (PRETRAINED / "tokenizer_config.json").read_bytes() == (
        small_folder() / "tokenizer_config.json"
    ).read_bytes()


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    export_checkpoint(small_checkpoint(), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(small_folder())


def test_weights_are_stored_in_half_precision_and_notes_are_kept() -> None:
    exported = load_network(small_folder()).state_dict()
    for name, value in load_network(small_checkpoint()).state_dict().items():
        assert torch.equal(exported[name], value.half().float())
    assert ModelFolder.open(small_folder()).notes["recipe"] == {"name": "small test", "seed": 0}


def test_the_card_says_how_it_was_made_and_how_it_was_accepted() -> None:
    card = (small_folder() / "card.md").read_text("utf-8")
    parameters = load_network(small_folder()).parameter_count()
    for part in (
        f"{parameters:,} parameters",
        "`RARA`",
        "recipe `small test`",
        "60 steps",
        "not validated",
        "| int8 |",
    ):
        assert part in card


def test_a_new_export_replaces_the_model_that_stood_there(tmp_path: Path) -> None:
    out = copy_of(small_folder(), tmp_path / "model")
    before = compute_digest(out)
    other = tmp_path / "other"
    other.mkdir()
    notes = {"step": 1}
    save_network(load_network(small_checkpoint()), other, tokenizer=small_tokenizer(), notes=notes)
    report = export_checkpoint(other, out)
    assert ModelFolder.open(out).digest == report.digest != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_folder_is_as_open_to_users_as_the_one_around_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    mask = os.umask(0o022)
    try:
        export_checkpoint(small_checkpoint(), tmp_path / "model")
    finally:
        os.umask(mask)
    assert oct((tmp_path / "model").stat().st_mode & 0o777) == "0o755"
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()} == {"0o644"}


def test_an_export_that_is_refused_leaves_the_old_model_as_it_was(broken: Path, tmp_path: Path) -> None:
    out = copy_of(small_folder(), tmp_path / "model")
    before = contents(out)
    with pytest.raises(ModelError, match=r"blocks\.1\.down\.weight holds a value that is not finite"):
        export_checkpoint(broken, out)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model"]


def test_an_export_that_is_refused_leaves_nothing_where_nothing_was(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        export_checkpoint(broken, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_old_model_comes_back_when_the_new_one_cannot_be_moved_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's refusal is faked: a rename beside it cannot be made to fail on a real one."""
    out = copy_of(small_folder(), tmp_path / "model")
    before, rename = contents(out), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == out and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="model cannot be written: Input/output error"):
        export_checkpoint(small_checkpoint(), out)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_graph_that_is_not_the_network_is_never_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the exporter is planted: it builds the graph of one network and holds it against another."""

    def other_network(folder: Path) -> StoryNetwork:
        loaded = load_network(folder)
        if folder != small_checkpoint():
            with torch.no_grad():
                loaded.embedding.weight.mul_(3.0)
        return loaded

    monkeypatch.setattr(training.export.export, "load_network", other_network)
    with pytest.raises(ModelError, match="runtime is not the network"):
        export_checkpoint(small_checkpoint(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def foreign_folders(tmp_path: Path) -> list[Path]:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("mine")
    mixed = copy_of(small_folder(), tmp_path / "mixed")
    (mixed / "diary.txt").write_text("mine")
    checkpoint = copy_of(small_checkpoint(), tmp_path / "checkpoint")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(checkpoint)
    return [notes, mixed, checkpoint, tmp_path / "file", tmp_path / "link", tmp_path]


def test_nothing_but_a_model_folder_is_ever_replaced(tmp_path: Path) -> None:
    places = foreign_folders(tmp_path)
    before = contents(tmp_path)
    for place in places:
        with pytest.raises(InputError, match=rf"out .*{place.name} exists and is not a") as caught:
            export_checkpoint(small_checkpoint(), place)
        assert caught.value.param == "out"
    assert contents(tmp_path) == before


def test_a_checkpoint_is_not_exported_onto_itself(tmp_path: Path) -> None:
    checkpoint = copy_of(small_checkpoint(), tmp_path / "best")
    with pytest.raises(InputError, match="best exists and is not a model folder: it has no digest"):
        export_checkpoint(checkpoint, checkpoint)
    assert contents(checkpoint) == contents(small_checkpoint())


def test_a_neighbour_with_a_likely_name_is_left_alone(tmp_path: Path) -> None:
    for name in ("model.new", "model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    export_checkpoint(small_checkpoint(), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new", "model.old"]
    assert (tmp_path / "model.new" / "mine").read_text() == (tmp_path / "model.old" / "mine").read_text() == "mine"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    export_checkpoint(small_checkpoint(), tmp_path / "model")
    ModelFolder.open(tmp_path / "model")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"out .*file/model cannot be written: Not a directory|File exists"):
        export_checkpoint(small_checkpoint(), tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config\.json cannot be read"),
        ("config.json", b"{}", r"config\.json is not a model of format 1"),
        ("model.safetensors", None, r"model\.safetensors cannot be read"),
        ("model.safetensors", b"????", r"model\.safetensors cannot be read"),
        ("tokenizer.json", None, r"there is no tokenizer here"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: not a readable tokenizer"),
    ],
)
def test_an_unusable_checkpoint_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    checkpoint = copy_of(small_checkpoint(), tmp_path / "best")
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"best.*{message}"):
        export_checkpoint(checkpoint, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint = copy_of(small_checkpoint(), tmp_path / "best")
    shutil.copy(
        Path(training.export.export.__file__).parents[2] / "model" / "pretrained" / "tokenizer.json", checkpoint
    )
    with pytest.raises(ModelError, match=r"best: tokenizer\.json has 4096 tokens, the network 384"):
        export_checkpoint(checkpoint, tmp_path / "model")


def test_a_network_of_the_tiny_recipe_can_be_exported(tmp_path: Path) -> None:
    """The quick start's: its matrices are narrower than the blocks of the shipped one."""
    config = load_recipe("tiny").model
    assert config.width < 64
    checkpoint = tmp_path / "best"
    checkpoint.mkdir()
    save_network(random_network(config), checkpoint, tokenizer=small_tokenizer(), notes={})
    assert export_checkpoint(checkpoint, tmp_path / "model").parameters > 0


FIRST: dict[str, Any] = {
    "recipe": smallest(name="first").as_dict(),
    "data": "aa11",
    "step": 1200,
    "tokens": 5_000_000,
    "elapsed": 600.0,
}
SECOND: dict[str, Any] = {
    "recipe": smallest(name="second", seed=7, dropout=0.1, average=0.98).as_dict(),
    "data": "bb22",
    "step": 90,
    "tokens": 70_000,
    "elapsed": 120.0,
    "best_bits_per_byte": 0.5,
    "init": {"digest": "c" * 64, **FIRST},
}


def card(folder: Path, notes: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps({"format": 1, "model": MODEL.as_dict(), **notes}))
    accepted = [Acceptance(precision="fp32", spread=2.5, largest={1: 1e-6})]
    write_card(folder, StoryNetwork(MODEL), accepted)
    return (folder / "card.md").read_text("utf-8")


def test_a_model_that_was_trained_in_one_run_names_one(tmp_path: Path) -> None:
    notes = card(tmp_path, FIRST)
    assert "- recipe `first`, seed 0, peak rate 0.02, 1,200 steps, 5,000,000 tokens, 10 minutes" in notes
    assert "from the weights of" not in notes
    assert "not validated" in notes


def test_a_continuation_reports_each_run_in_order_and_what_was_other_in_it(tmp_path: Path) -> None:
    notes = card(tmp_path, SECOND)
    lines = [line for line in notes.splitlines() if "recipe `" in line]
    assert lines == [
        "- recipe `first`, seed 0, peak rate 0.02, 1,200 steps, 5,000,000 tokens, 10 minutes; data digest `aa11`",
        "- from the weights of `cccccccccccc`: recipe `second`, seed 7, peak rate 0.02, dropout 0.1, average of the "
        "weights 0.98, 90 steps, 70,000 tokens, 2 minutes; data digest `bb22`",
    ]
    assert "0.5000 bits per byte" in notes


def test_the_history_begins_with_the_first_run() -> None:
    assert history(SECOND) == [SECOND["init"], SECOND]
    assert history(FIRST) == [FIRST]


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


def test_an_export_reports_whose_weights_were_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "model"
    export_checkpoint(small_checkpoint(), out, blend_with=small_folder())
    digest = ModelFolder.open(small_folder()).digest
    assert ModelFolder.open(out).notes["blend"] == {"share": 0.5, "digest": digest}
    assert f"the mean of these weights and, to 50%, those of `{digest[:12]}`" in (out / "card.md").read_text("utf-8")
    assert "blend" not in ModelFolder.open(small_folder()).notes


def test_a_model_of_other_sizes_is_refused(other: Path) -> None:
    network = random_network(dataclasses.replace(SMALL, mlp_width=64))
    with pytest.raises(InputError, match=r"^blend has model\.mlp_width = 128 \(.*\), and not 64$"):
        blend(network, other, small_tokenizer())


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        blend(load_network(small_checkpoint()), tmp_path / "nothing", small_tokenizer())
