"""The compiled decoder for ctypes, and what it reads: records as `model/runtimes/native/csrc/story.h` has them.

The library is built when the project is installed, where a C compiler is; it holds one path for each kind of processor
and needs no Python headers. Where it is missing, ONNX Runtime writes instead (`model/engine/load.py`).

Matrices become int8 with one scale for each 64 inputs of an output, as the exported int8 graph has them. Their order
is the one in which the kernels read (`csrc/story.h`): sixteen outputs lie together, of each four inputs. It takes
about a tenth of a second, so nothing of it is stored.

Shapes: O outputs, I inputs, G groups of 16 outputs, B blocks of 64 inputs, D width, H heads, P values a head, N keys a
head, K taps, M channels that the convolution mixes, V vocabulary, W window.
"""

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_char_p, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.folder import ModelConfig
from model.errors import ModelError

BLOCK, GROUP, QUAD = 64, 16, 4
"""Inputs that share a scale; outputs, and inputs, whose weights lie together (`story.h`). The exported int8 graph has
the same blocks: with 128 a single stream takes a tenth less time, but ONNX Runtime's AVX-512 kernel then sums one row
in another order than several, and results would depend on batch mates."""


class Matrix(Structure):
    """A linear layer of int8 weights."""

    _fields_ = (
        *((name, c_int64) for name in ("outputs", "inputs", "blocks", "positive_inputs")),
        *((name, c_void_p) for name in ("levels", "scale", "start")),
    )


class Layer(Structure):
    """A mixer and the MLP that follows it."""

    _fields_ = (
        *((name, c_int64) for name in ("attention", "memory")),
        *((name, Matrix) for name in ("inputs", "output", "up", "down")),
        *((name, c_void_p) for name in ("taps", "rate", "rate_bias", "speed", "skip", "gain")),
    )


class Network(Structure):
    """Sizes, layers and tables."""

    _fields_ = (
        *((name, c_int64) for name in ("vocab", "width", "layer_count", "heads", "head_dim", "key_dim", "taps")),
        *((name, c_int64) for name in ("window", "mlp", "memory")),
        ("layers", POINTER(Layer)),
        ("embedding", c_void_p),
        ("logits", Matrix),
        ("frequency", c_void_p),
    )


class Work(Structure):
    """Tokens to take in, and the memories that they change."""

    _fields_ = (
        ("rows", c_int64),
        *((name, c_void_p) for name in ("slot", "token", "take", "memory", "position", "logits", "scratch")),
    )


class Draw(Structure):
    """Tokens to choose, one a row, and by which rules."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "vocab")),
        *((name, c_void_p) for name in ("logits", "position", "scale", "penalty", "min_p", "top_p", "top_k")),
        *((name, c_void_p) for name in ("start", "greedy", "mask", "adjusted", "forbidden")),
        *((name, c_void_p) for name in ("seen", "bias", "deduction", "token")),
        *((name, c_void_p) for name in ("levels", "weights", "keys", "ends", "blocks")),
    )


def library_file() -> Path | None:
    """Where the library is, or None if it was not built."""
    places = (Path(__file__).with_name("_native" + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((place for place in places if place.is_file()), None)


@cache
def library() -> Any:
    """The loaded library. Raises `ModelError` if it was not built or cannot be loaded."""
    path = library_file()
    if path is None:
        raise ModelError("the native runtime is not built: install the project again where a C compiler is")
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.story_path_name.restype = c_char_p
        loaded.story_path_name.argtypes = [c_int64]
        loaded.story_paths.restype = loaded.story_scratch.restype = loaded.story_forward.restype = c_int64
        loaded.story_scratch.argtypes = [c_int64, c_void_p]
        loaded.story_forward.argtypes = [c_int64, c_void_p, c_void_p]
        loaded.story_product.restype = None
        loaded.story_product.argtypes = [c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
        loaded.story_sample.restype = None
        loaded.story_sample.argtypes = [c_int64, c_void_p]
    except (OSError, AttributeError) as error:
        raise ModelError(f"the native runtime in {path.name} cannot be loaded: {error}") from None
    return loaded


@cache
def paths() -> dict[str, int]:
    """The paths that this processor can run, best first, with their numbers. Raises `ModelError`."""
    names = ((library().story_path_name(number), number) for number in range(library().story_paths()))
    return {name.decode(): number for name, number in names if name is not None}


Floats = npt.NDArray[np.float32]
LONGEST_HEAD = 256


def unsuitable(config: ModelConfig) -> str | None:
    """Why the compiled decoder cannot run a network of these sizes, or None if it can: it takes several at a time."""
    for name, lanes in (("width", 8), ("mlp_width", 8), ("head_dim", 16), ("key_dim", 8), ("window", 8)):
        if (value := getattr(config, name)) % lanes:
            return f"{name} must be a multiple of {lanes}, got {value}"
    if config.head_dim > LONGEST_HEAD:
        return f"head_dim must be at most {LONGEST_HEAD}, got {config.head_dim}"
    return None


def quantize_matrix(weight_OI: Floats, block: int = BLOCK) -> tuple[npt.NDArray[np.int8], Floats]:
    """int8 levels (O, B, block), -127 to 127, and scales (O, B); inputs that do not fill the last block are zeros."""
    padded = np.pad(weight_OI, ((0, 0), (0, -weight_OI.shape[1] % block)))
    blocks = padded.reshape(len(padded), -1, block)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    levels = np.rint(blocks / np.where(scale > 0, scale, 1)[..., None]).clip(-127, 127)
    return levels.astype(np.int8), scale.astype(np.float32)


class PackedNetwork:
    """The record that the decoder takes, and the arrays that it points into.

    Raises:
        ModelError: a tensor is missing, has another shape, or holds a value that is not finite.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, npt.NDArray[Any]], source: str) -> None:
        if reason := unsuitable(config):
            raise ModelError(f"the native runtime cannot run this network: {reason}")
        self.config, self._weights, self._source = config, weights, source
        self._kept: list[npt.NDArray[Any]] = []
        self.layers = (Layer * len(config.pattern))()
        heads, keys, values, width = config.heads, config.key_dim, config.head_dim, config.width
        inner, channels = heads * values, 2 * heads * keys + heads * values
        memory = 0
        for index, kind in enumerate(config.pattern):
            layer, mixer = self.layers[index], f"blocks.{index}.mixer."
            layer.attention, layer.memory = kind == "A", memory
            if kind == "A":
                layer.inputs = self._matrix(mixer + "inputs.weight", inner + 2 * values, width)
                layer.gain = self._keep(self._vector(mixer + "gain", heads, 1) * np.float32(values**-0.5))
                memory += 2 * config.window * values
            else:
                layer.inputs = self._matrix(mixer + "inputs.weight", channels + inner, width)
                layer.taps = self._keep(self._vector(mixer + "conv", config.conv_width, channels))
                layer.rate = self._keep(self._vector(mixer + "rate.weight", heads, width))
                layer.rate_bias = self._keep(self._vector(mixer + "rate.bias", heads))
                layer.speed = self._keep(np.exp(self._vector(mixer + "log_decay", heads)))
                layer.skip = self._keep(self._vector(mixer + "skip", heads, 1))
                memory += (config.conv_width - 1) * channels + heads * keys * values
            layer.output = self._matrix(mixer + "output.weight", width, inner)
            layer.up = self._matrix(f"blocks.{index}.up.weight", config.mlp_width, width)
            # Squared ReLU is never negative, so all 255 levels of a byte lie above zero.
            layer.down = self._matrix(f"blocks.{index}.down.weight", width, config.mlp_width, positive=True)
        embedding = "embedding.weight"
        half = values // 2
        self.memory = memory
        """Floats of one stream's memory."""
        self.record = Network(
            vocab=config.vocab_size,
            width=width,
            layer_count=len(config.pattern),
            heads=heads,
            head_dim=values,
            key_dim=keys,
            taps=config.conv_width,
            window=config.window,
            mlp=config.mlp_width,
            memory=memory,
            layers=self.layers,
            embedding=self._keep(self._vector(embedding, config.vocab_size, width)),
            logits=self._matrix(embedding, config.vocab_size, width),
            frequency=self._keep(config.rope_base ** (-np.arange(half, dtype=np.float64) / half)),
        )
        self.address = ctypes.addressof(self.record)

    def _keep(self, array: npt.NDArray[Any]) -> int:
        """The address of an array's numbers, which then live as long as this object."""
        self._kept.append(np.ascontiguousarray(array))
        return self._kept[-1].ctypes.data

    def _vector(self, name: str, *shape: int) -> Floats:
        try:
            value = self._weights[name].astype(np.float32)
        except KeyError:
            raise ModelError(f"{self._source} has no {name}") from None
        if value.shape != shape:
            raise ModelError(f"{self._source}: {name} has the shape {value.shape}, config.json asks for {shape}")
        if not np.isfinite(value).all():
            raise ModelError(f"{self._source}: {name} holds a value that is not finite")
        return value

    def _matrix(self, name: str, outputs: int, inputs: int, *, positive: bool = False) -> Matrix:
        return self.pack(self._vector(name, outputs, inputs), positive=positive)

    def pack(self, weight_OI: Floats, *, positive: bool) -> Matrix:
        """A matrix for the decoder. `positive`: its inputs are never negative."""
        outputs, inputs = weight_OI.shape
        levels_OBI, scale_OB = quantize_matrix(np.pad(weight_OI, ((0, -outputs % GROUP), (0, 0))))
        groups, blocks = len(levels_OBI) // GROUP, levels_OBI.shape[1]
        quads = levels_OBI.reshape(groups, GROUP, blocks * BLOCK // QUAD, QUAD).swapaxes(1, 2)
        start_OB = levels_OBI.sum(2, dtype=np.int32) * (0 if positive else -128)
        arrays = (quads, *(part.reshape(groups, GROUP, blocks).swapaxes(1, 2) for part in (scale_OB, start_OB)))
        return Matrix(outputs, inputs, blocks, positive, *map(self._keep, arrays))
