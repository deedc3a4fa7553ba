"""A model folder: all files that a model is served from, with a digest.

`config.json` (sizes, recipe, where it comes from), `model.safetensors` (weights), `tokenizer.json`, one decode graph
for each precision (`decode.int8.onnx`, `decode.fp32.onnx`), `tokenizer_config.json` for the `transformers` library,
`card.md` for people, and `digest`: SHA-256 over all files that decide what is generated. Nothing here needs PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.config import ModelConfig
from model.errors import ModelError

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
"""The model that ships with the project."""
PRECISIONS = ("int8", "fp32")
DIGESTED = ("config.json", "model.safetensors", "tokenizer.json", *(f"decode.{name}.onnx" for name in PRECISIONS))
FILES = (*DIGESTED, "tokenizer_config.json", "card.md", "digest")
"""All files of a folder."""


def read_file(path: Path) -> bytes:
    """The file's content. Raises `ModelError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, its format checked. Raises `ModelError`."""
    path = folder / "config.json"
    try:
        config = json.loads(read_file(path))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    known: dict[str, Any] = config if isinstance(config, dict) and config.get("format") == FORMAT else {}
    if not isinstance(known.get("model"), dict):
        raise ModelError(f"{path} is not a model of format {FORMAT}")
    return known


def read_sizes(folder: Path) -> ModelConfig:
    """The network's sizes out of the folder's config.json. Raises `ModelError` that names the file."""
    values = read_config(folder)["model"]
    try:
        return ModelConfig.from_dict(values)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def compute_digest(folder: Path) -> str:
    """SHA-256 (hex) over names and contents of the files that decide what is generated. Raises `ModelError`."""
    digest = hashlib.sha256()
    for name in DIGESTED:
        content = read_file(folder / name)
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """An opened folder whose files agree with its digest."""

    path: Path
    config: ModelConfig
    notes: dict[str, Any]
    """config.json without the sizes: recipe, data digest, step, figures."""
    digest: str

    @classmethod
    def open(cls, path: Path) -> ModelFolder:
        """Open and verify `path`.

        Raises:
            ModelError: a file is missing, or the contents are not those that were exported.
        """
        if not path.is_dir():
            raise ModelError(f"{path} is not a model folder; `story export CHECKPOINT` makes one")
        notes = read_config(path)
        config = read_sizes(path)
        del notes["model"]
        stated, found = read_file(path / "digest").decode("ascii", "replace").strip(), compute_digest(path)
        if stated != found:
            raise ModelError(f"{path} is damaged: its digest is {found[:12]}, and {stated[:12]} was exported")
        return cls(path, config, notes, stated)

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def graph(self, precision: str) -> Path:
        """The decode graph of `precision`. Raises `ModelError` for an unknown one."""
        if precision not in PRECISIONS:
            raise ModelError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        return self.path / f"decode.{precision}.onnx"


TYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
"""The types that this project's exports hold."""


def read_weights(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All tensors of `path`, of the type they are stored in.

    Raises:
        ModelError: the file cannot be read, is no safetensors file, or holds another type than F16 and F32.
    """
    content = read_file(path)
    begin = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    try:
        header = json.loads(content[8:begin])
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                kind, shape = TYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
                tensors[name] = np.frombuffer(content[begin + first : begin + last], kind).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file of {' or '.join(TYPES)}: {error}") from None
    return tensors
