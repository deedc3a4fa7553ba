"""What a model is on disk: sizes, weights, checkpoints, and the folder with its digest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from model.architecture.folder import (
    DIGESTED,
    FILES,
    PRECISIONS,
    PRETRAINED,
    ModelConfig,
    ModelFolder,
    compute_digest,
    read_config,
    read_weights,
)
from model.architecture.network import load_network, save_network
from model.errors import ModelError
from tests.model.small_model import SMALL, copy_of, random_network, small_checkpoint, small_folder, small_tokenizer

# Sizes


SIZE = st.integers(1, 10_000)


@given(st.text("RA", min_size=1, max_size=30), SIZE, SIZE, SIZE, st.floats(1, 1e9))
def test_a_config_survives_json(pattern: str, width: int, window: int, half: int, base: float) -> None:
    config = ModelConfig(pattern=pattern, width=width, window=window, head_dim=2 * half, rope_base=base)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("width", 0, "at least 1, got 0"),
        ("width", 1.5, "whole number"),
        ("heads", True, "whole number"),
        ("vocab_size", "many", "whole number"),
        ("window", None, "whole number"),
        ("head_dim", 33, "must be even"),
        ("pattern", "", "letters R and A"),
        ("pattern", "RRx", "letters R and A, one a layer, got 'RRx'"),
        ("pattern", ["R", "A"], "letters R and A"),
        ("pattern", 5, "letters R and A"),
        ("rope_base", 0, "at least 1"),
        ("rope_base", "big", "at least 1"),
        ("rope_base", float("nan"), "at least 1"),
        ("rope_base", float("inf"), "at least 1"),
    ],
)
def test_a_wrong_size_is_named_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.{name}.*{allowed}"):
        ModelConfig.from_dict({name: value})


def test_an_unknown_name_is_reported_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"model\.depth is not known; allowed are chunk, .*window"):
        ModelConfig.from_dict({"width": 64, "depth": 6})


# A model folder


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
    assert [opened.graph(precision).name for precision in PRECISIONS] == ["decode.int8.onnx", "decode.fp32.onnx"]
    assert all(opened.graph(precision).is_file() for precision in PRECISIONS)


def test_the_digest_is_sha256_over_name_size_and_content_of_each_file(folder: Path) -> None:
    files = ("config.json", "model.safetensors", "tokenizer.json", "decode.int8.onnx", "decode.fp32.onnx")
    parts = (f"{name} {(folder / name).stat().st_size}\n".encode() + (folder / name).read_bytes() for name in files)
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
    with pytest.raises(ModelError, match=rf"tale is damaged: its digest is \w{{12}}, and {before[:12]} was exported"):
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


def test_an_unknown_precision_is_reported_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ModelError, match="precision must be one of int8, fp32, got 'fp8'"):
        ModelFolder.open(folder).graph("fp8")


def test_the_shipped_folder_is_whole_and_small_enough_to_ship() -> None:
    opened = ModelFolder.open(PRETRAINED)
    assert json.loads((PRETRAINED / "config.json").read_text())["model"] == opened.config.as_dict()
    assert read_config(PRETRAINED)["format"] == 1
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*")) <= SHIPPED_LIMIT
    assert (PRETRAINED / "card.md").read_text("utf-8").startswith("# ")
    assert {path.name for path in PRETRAINED.iterdir()} == set(FILES)


# A checkpoint


CONFIG = ModelConfig(vocab_size=40, width=16, pattern="RA", mlp_width=32, heads=2, head_dim=8, key_dim=4, window=8)


def save_random(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    network = random_network(CONFIG)
    folder.mkdir(exist_ok=True)
    save_network(network, folder, tokenizer=small_tokenizer(), notes={"step": 7, "why": "a test"}, dtype=dtype)
    return network.state_dict()


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    weights = save_random(tmp_path)
    loaded = load_network(tmp_path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_weights_saved_in_half_precision_come_back_as_fp32_of_the_rounded_values(tmp_path: Path) -> None:
    weights = save_random(tmp_path, torch.float16)
    loaded = load_network(tmp_path).state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert all(torch.equal(value, weights[name].half().float()) for name, value in loaded.items())
    assert any(not torch.equal(value, weights[name]) for name, value in loaded.items())


def test_config_json_holds_the_sizes_and_the_notes(tmp_path: Path) -> None:
    save_random(tmp_path)
    assert read_config(tmp_path) == {"format": 1, "model": CONFIG.as_dict(), "step": 7, "why": "a test"}


def test_the_tokenizer_goes_along_also_when_it_is_there_already(tmp_path: Path) -> None:
    save_random(tmp_path)
    own = tmp_path / "tokenizer.json"
    assert own.read_bytes() == small_tokenizer().read_bytes()
    save_network(random_network(CONFIG), tmp_path, tokenizer=own, notes={})
    assert own.read_bytes() == small_tokenizer().read_bytes()


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        save_random(tmp_path)
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


@pytest.mark.parametrize(("name", "value"), [("width", 128), ("pattern", "RARAR"), ("pattern", "RRRR"), ("heads", 4)])
def test_weights_of_other_sizes_are_refused(name: str, value: object, tmp_path: Path) -> None:
    folder = copy_of(small_checkpoint(), tmp_path / "checkpoint")
    config = read_config(folder)
    config["model"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"checkpoint: weights and config\.json do not fit: .") as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)


# Reading safetensors, against the library of that name


def test_the_shipped_weights_are_read_as_the_library_reads_them() -> None:
    ours, theirs = read_weights(PRETRAINED / "model.safetensors"), load_file(PRETRAINED / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert np.array_equal(ours[name], value)


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4), halves=st.booleans())
def test_whatever_the_library_writes_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], halves: bool
) -> None:
    kind = np.float16 if halves else np.float32
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal(shape).astype(kind) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    path.write_bytes(save(tensors, metadata={"made": "here"}))
    found = read_weights(path)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], value) for name, value in tensors.items())
    assert all(found[name].shape == value.shape for name, value in tensors.items())


def with_header(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"\xff" * 40,
        with_header([1, 2]),
        with_header({"x": {"dtype": "F16", "shape": [2]}}),
        with_header({"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"ab"),
        with_header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"too short"),
        with_header({"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}, b"four"),
    ],
)
def test_what_is_no_safetensors_file_is_named_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"odd\.safetensors is not a safetensors file of F16 or F32: .") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_named_by_the_reader_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none cannot be read: No such file"):
        read_weights(tmp_path / "none")
