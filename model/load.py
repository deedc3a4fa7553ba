"""From a model folder to an engine that writes: the one place where the serving parts are put together."""

from __future__ import annotations

from pathlib import Path

from model.engine import Engine
from model.folder import PRETRAINED, ModelFolder
from model.onnx_runtime import PREFILL_CHUNK, OnnxRuntime
from model.tokenizer import StoryTokenizer


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
