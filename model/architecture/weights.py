"""Read a safetensors file with nothing but numpy, so that serving needs no further package for it.

The format: eight bytes of header length (little-endian), a JSON header that names each tensor's type, shape and place,
then the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.folder import read_file
from model.errors import ModelError

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
