"""Builds the decoder in C (`model/runtimes/native/csrc/`) as an installation goes along; all else is in pyproject.toml.

The extension is optional: without a compiler the project installs all the same, and ONNX Runtime writes the stories. It
holds no Python at all and is loaded by ctypes, so Python's own headers are not needed. Neither -march=native, since it
chooses its instructions when it runs, nor -ffast-math, since its sums have the same bits on every processor
(`model/runtimes/native/csrc/lanes.h`).
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

FLAGS = [
    "-std=gnu11",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
]

setup(
    ext_modules=[
        Extension(
            "model.runtimes.native._native",
            sorted(glob("model/runtimes/native/csrc/*.c")),
            depends=sorted(glob("model/runtimes/native/csrc/*.h")),
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
