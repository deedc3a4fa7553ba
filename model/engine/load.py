"""From a model folder to an engine that writes: the one place where the serving parts are put together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model.architecture.config import ModelConfig
from model.architecture.folder import PRETRAINED, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.errors import ModelError
from model.runtimes.native.library import library_file
from model.runtimes.native.weights import unsuitable
from model.runtimes.protocol import PREFILL_CHUNK, EmbeddedRuntime

if TYPE_CHECKING:
    from model.runtimes.torch.runtime import TorchRuntime

RuntimeChoice = Literal["auto", "native", "onnx"]


def why_not_native(config: ModelConfig, precision: str) -> str | None:
    """What keeps the native runtime from writing, or None if nothing does."""
    if precision != "int8":
        return f"it computes in int8, and the precision is {precision}"
    if library_file() is None:
        return "it is not built: install the project again where a C compiler is (Debian: gcc)"
    return unsuitable(config)


def load_runtime(
    folder: ModelFolder,
    *,
    slots: int = 16,
    threads: int = 1,
    precision: str = "int8",
    runtime: RuntimeChoice = "auto",
) -> EmbeddedRuntime:
    """The embedded runtime of an opened folder; its `name` tells which one it is.

    Args:
        threads: of ONNX Runtime; the native runtime has one.
        runtime: `auto` takes the native one where it can write, which ONNX Runtime otherwise does.

    Raises:
        ModelError: the folder's files are unusable, the precision is unknown, or `native` was asked for and cannot be.
    """
    graph = folder.graph(precision)
    reason = None if runtime == "onnx" else why_not_native(folder.config, precision)
    if runtime == "native" and reason:
        raise ModelError(f"the native runtime cannot be used: {reason}")
    if runtime == "onnx" or reason:
        from model.runtimes.onnx.runtime import OnnxRuntime  # takes a second to import

        return OnnxRuntime(graph, folder.config, max_batch=slots, threads=threads)
    from model.runtimes.native.runtime import NativeRuntime

    return NativeRuntime(folder.weights, folder.config, max_batch=slots)


def load_engine(
    folder: Path | None = None,
    *,
    slots: int = 16,
    threads: int = 1,
    precision: str = "int8",
    runtime: RuntimeChoice = "auto",
    queue_limit: int = 64,
) -> Engine:
    """An engine over `folder` (None: the shipped model); use it as a context manager.

    Its `runtime_name` tells which runtime writes: with another one the same seed may tell another story.

    Args:
        folder: a model folder made by `story export`.
        slots: stories written at once; more wait in the queue.
        threads: of ONNX Runtime; the native runtime has one.
        precision: `int8` or `fp32`.
        runtime: `auto`, `native` or `onnx`; see `load_runtime`.
        queue_limit: stories that may wait.

    Raises:
        ModelError: the folder is missing, damaged or of another format, or the runtime cannot be had.
    """
    opened = ModelFolder.open(folder or PRETRAINED)
    writes = load_runtime(opened, slots=slots, threads=threads, precision=precision, runtime=runtime)
    tokenizer = StoryTokenizer.load(opened.tokenizer)
    return Engine(writes, tokenizer, queue_limit=queue_limit, prefill_chunk=PREFILL_CHUNK)


def load_torch_runtime(folder: ModelFolder, *, slots: int = 16, device: str = "cuda") -> TorchRuntime:
    """The PyTorch runtime of an opened folder; on a GPU it samples there too. Raises `ModelError`."""
    try:
        from model.runtimes.torch.runtime import DeviceRuntime, TorchRuntime, find_device
    except ImportError as error:
        raise ModelError(
            f"writing on {device} needs PyTorch and safetensors, and {error.name} is missing"
        ) from None
    kind = DeviceRuntime if find_device(device).type == "cuda" else TorchRuntime
    return kind.load(folder.path, max_batch=slots, device=device)


def load_torch_engine(
    folder: Path | None = None, *, slots: int = 16, device: str = "cuda", queue_limit: int = 64
) -> Engine:
    """`load_engine` over PyTorch: for machines with a GPU. Nothing else here imports torch.

    Args:
        folder: a model folder made by `story export`; None: the shipped model.
        slots: stories written at once; more wait in the queue.
        device: `cuda`, or `cpu`, where the embedded runtime is much faster.
        queue_limit: stories that may wait.

    Raises:
        ModelError: the folder is missing, damaged or of another format, or the device is not there.
    """
    opened = ModelFolder.open(folder or PRETRAINED)
    runtime = load_torch_runtime(opened, slots=slots, device=device)
    tokenizer = StoryTokenizer.load(opened.tokenizer)
    return Engine(runtime, tokenizer, queue_limit=queue_limit, prefill_chunk=PREFILL_CHUNK)
