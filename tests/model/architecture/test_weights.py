"""The reader of safetensors against the library of that name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from model.architecture.folder import PRETRAINED
from model.architecture.weights import read_weights
from model.errors import ModelError


def test_the_shipped_weights_are_read_as_the_library_reads_them() -> None:
    ours, theirs = read_weights(PRETRAINED / "model.safetensors"), load_file(PRETRAINED / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert np.array_equal(ours[name], value)


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    halves=st.booleans(),
)
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
    with pytest.raises(
        ModelError, match=r"odd\.safetensors is not a safetensors file of F16 or F32: ."
    ) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none cannot be read: No such file"):
        read_weights(tmp_path / "none")
