"""The compiled decoder, found and described for ctypes: records as `model/runtimes/native/csrc/story.h` has them.

The library is built when the project is installed, where a C compiler is; it holds one path for each kind of processor
and needs no Python headers. Where it is missing, ONNX Runtime writes instead (`model/engine/load.py`).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

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
