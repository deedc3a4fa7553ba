"""A model folder: everything that writes stories, in one place, and able to prove that it is whole.

`config.json` (sizes, recipe, where it comes from), `model.safetensors` (weights), `tokenizer.json`, one decode graph
for each precision (`decode.int8.onnx`, `decode.fp32.onnx`), `card.md` for people, and `digest`: SHA-256 over all
files that decide what is written. Nothing here needs PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.architecture.config import ModelConfig
from model.errors import ModelError

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
"""The model that ships with the project."""
PRECISIONS = ("int8", "fp32")
DIGESTED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    *(f"decode.{name}.onnx" for name in PRECISIONS),
)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, its format checked. Raises `ModelError`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if (
        not isinstance(config, dict)
        or config.get("format") != FORMAT
        or not isinstance(config.get("model"), dict)
    ):
        raise ModelError(f"{path} is not a model of format {FORMAT}")
    return config


def read_sizes(folder: Path) -> ModelConfig:
    """The network's sizes out of the folder's config.json. Raises `ModelError` that names the file."""
    values = read_config(folder)["model"]
    try:
        return ModelConfig.from_dict(values)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def compute_digest(folder: Path) -> str:
    """SHA-256 (hex) over names and contents of the files that decide what is written. Raises `ModelError`."""
    digest = hashlib.sha256()
    for name in DIGESTED:
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise ModelError(f"{folder / name} cannot be read: {error.strerror}") from None
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
        try:
            stated = (path / "digest").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path / 'digest'} cannot be read: {error}") from None
        found = compute_digest(path)
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
