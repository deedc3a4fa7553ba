"""A model folder: all files that a model is served from, with a digest, and the network's shape that it states.

`config.json` (sizes, recipe, where it comes from), `model.safetensors` (weights), `tokenizer.json`, one decode graph
for each precision (`decode.int8.onnx`, `decode.fp32.onnx`), `tokenizer_config.json` for the `transformers` library,
`card.md` for people, and `digest`: SHA-256 over all files that decide what is generated. Nothing here needs PyTorch.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from model.errors import ModelError

END_ID = 0
"""The token that stands before every story; its prediction ends the story."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of one network. Raises `ModelError` when they do not fit together."""

    vocab_size: int = 4096
    width: int = 256
    """D: size of the residual stream."""
    pattern: str = "RRARRA"
    """One letter a layer: `R` is a gated recurrence with a constant-size state, `A` attention over a sliding window.

    The default is the hybrid that ships (Griffin, De et al. 2024); `"AAAAAA"` and `"RRRRRR"` are its controls."""
    mlp_width: int = 896
    """Hidden size of the ReLU² MLP that follows each mixer."""
    heads: int = 4
    """H: heads of the recurrence and query heads of attention, which all share one key and value head."""
    head_dim: int = 64
    """P: values a head."""
    key_dim: int = 32
    """N: keys a head of the recurrence; its state is N x P a head."""
    conv_width: int = 4
    """Taps of the causal convolution in front of the recurrence."""
    window: int = 256
    """W: tokens that attention sees, the present one included."""
    chunk: int = 64
    """Length of the chunks in which the recurrence is trained in parallel; changes no result."""
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.name not in ("pattern", "rope_base") and not (whole and value >= 1):
                raise ModelError(f"model.{field.name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - set("RA"):
            raise ModelError(f"model.pattern must be letters R and A, one a layer, got {self.pattern!r}")
        if isinstance(self.rope_base, bool) or not (
            isinstance(self.rope_base, int | float) and 1 <= self.rope_base < math.inf
        ):
            raise ModelError(f"model.rope_base must be a number of at least 1, got {self.rope_base!r}")
        if self.head_dim % 2:
            raise ModelError(f"model.head_dim must be even for rotary positions, got {self.head_dim}")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The reverse of `as_dict`; an unknown name is an error that says which are known."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ModelError(f"model.{unknown[0]} is not known; allowed are {', '.join(sorted(known))}")
        return cls(**values)


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
    def open(cls, path: Path) -> Self:
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
