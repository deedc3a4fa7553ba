"""From a model folder to an engine that writes: the one place where the serving parts are put together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.engine import Engine
from model.errors import ModelError
from model.folder import PRETRAINED, ModelFolder
from model.onnx_runtime import PREFILL_CHUNK, OnnxRuntime
from model.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from model.torch_runtime import TorchRuntime


def load_runtime(
    folder: ModelFolder, *, slots: int = 16, threads: int = 1, precision: str = "int8"
) -> OnnxRuntime:
    """The embedded runtime of an opened folder. Raises `ModelError`."""
    return OnnxRuntime(folder.graph(precision), folder.config, max_batch=slots, threads=threads)


def load_engine(
    folder: Path | None = None,
    *,
    slots: int = 16,
    threads: int = 1,
    precision: str = "int8",
    queue_limit: int = 64,
) -> Engine:
    """An engine over `folder` (None: the shipped model); use it as a context manager.

    Args:
        folder: a model folder made by `story export`.
        slots: stories written at once; more wait in the queue.
        threads: of ONNX Runtime.
        precision: `int8` or `fp32`.
        queue_limit: stories that may wait.

    Raises:
        ModelError: the folder is missing, damaged or of another format.
    """
    opened = ModelFolder.open(folder or PRETRAINED)
    runtime = load_runtime(opened, slots=slots, threads=threads, precision=precision)
    tokenizer = StoryTokenizer.load(opened.tokenizer)
    return Engine(runtime, tokenizer, queue_limit=queue_limit, prefill_chunk=PREFILL_CHUNK)


def load_torch_runtime(folder: ModelFolder, *, slots: int = 16, device: str = "cuda") -> TorchRuntime:
    """The PyTorch runtime of an opened folder; on a GPU it samples there too. Raises `ModelError`."""
    try:
        from model.torch_runtime import DeviceRuntime, TorchRuntime, find_device
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
