from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from model.architecture.folder import (
    DIGESTED,
    PRECISIONS,
    PRETRAINED,
    ModelFolder,
    compute_digest,
    read_config,
)
from model.errors import ModelError
from tests.model.small_model import SMALL, copy_of, small_folder

SHIPPED_LIMIT = 25 * 1024 * 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of(small_folder(), tmp_path / "tale")


def test_an_exported_folder_opens_with_its_sizes_notes_and_graphs(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    assert opened.config == SMALL
    assert opened.notes["recipe"]["name"] == "small test"
    assert "model" not in opened.notes
    assert opened.tokenizer.is_file()
    assert [opened.graph(precision).name for precision in PRECISIONS] == [
        "decode.int8.onnx",
        "decode.fp32.onnx",
    ]
    assert all(opened.graph(precision).is_file() for precision in PRECISIONS)


def test_the_digest_is_sha256_over_name_size_and_content_of_each_file(folder: Path) -> None:
    files = ("config.json", "model.safetensors", "tokenizer.json", "decode.int8.onnx", "decode.fp32.onnx")
    parts = (
        f"{name} {(folder / name).stat().st_size}\n".encode() + (folder / name).read_bytes() for name in files
    )
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    assert compute_digest(folder) == ModelFolder.open(folder).digest == expected
    assert (folder / "digest").read_text() == expected + "\n"


@pytest.mark.parametrize("name", DIGESTED)
def test_one_changed_byte_in_any_file_changes_the_digest_and_is_noticed(name: str, folder: Path) -> None:
    before = compute_digest(folder)
    content = bytearray((folder / name).read_bytes())
    # config.json must stay readable, so that the digest and not the parser notices: a blank becomes a tab.
    at = content.index(b" ") if name.endswith(".json") else len(content) // 2
    content[at] = 9 if name.endswith(".json") else content[at] ^ 1
    (folder / name).write_bytes(content)
    assert compute_digest(folder) != before
    with pytest.raises(
        ModelError, match=rf"tale is damaged: its digest is \w{{12}}, and {before[:12]} was exported"
    ):
        ModelFolder.open(folder)


@pytest.mark.parametrize("name", [*DIGESTED, "digest"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"tale/{name} cannot be read"):
        ModelFolder.open(folder)


def test_the_card_may_be_edited(folder: Path) -> None:
    (folder / "card.md").write_text("# Ours\n")
    assert ModelFolder.open(folder).digest == compute_digest(small_folder())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "is not a model of format 1"),
        (b'{"format": 2, "model": {}}', "is not a model of format 1"),
        (b'{"format": 1, "model": "RRA"}', "is not a model of format 1"),
        (b'{"format": 1, "model": {"width": -1}}', r"model\.width must be a whole number of at least 1"),
        (b'{"format": 1, "model": {"depth": 3}}', r"model\.depth is not known"),
    ],
)
def test_an_unusable_config_is_named_with_the_reason(content: bytes, message: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"tale/config\.json:? {message}"):
        ModelFolder.open(folder)


def test_what_is_no_folder_says_how_to_make_one(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "nowhere", folder / "config.json"):
        with pytest.raises(ModelError, match=r"is not a model folder; `story export CHECKPOINT` makes one"):
            ModelFolder.open(path)


def test_an_unknown_precision_is_told_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ModelError, match="precision must be one of int8, fp32, got 'fp8'"):
        ModelFolder.open(folder).graph("fp8")


def test_the_shipped_folder_is_whole_and_small_enough_to_ship() -> None:
    opened = ModelFolder.open(PRETRAINED)
    assert json.loads((PRETRAINED / "config.json").read_text())["model"] == opened.config.as_dict()
    assert read_config(PRETRAINED)["format"] == 1
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*")) <= SHIPPED_LIMIT
    assert (PRETRAINED / "card.md").read_text("utf-8").startswith("# ")
