"""From a model folder to an engine: which runtime it gets, and how the parts are put together."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model.architecture.folder import PRETRAINED, ModelConfig, ModelFolder, read_sizes
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.errors import ModelError
from model.generation import Completion, GenerationRequest, SamplingParams
from model.runtimes.native.library import library_file, unsuitable
from model.runtimes.protocol import Runtime

if TYPE_CHECKING:
    from model.runtimes.torch.runtime import TorchRuntime

RuntimeChoice = Literal["auto", "native", "onnx"]
WARM_UP_SECONDS = 60.0


def why_not_native(config: ModelConfig, precision: str) -> str | None:
    """Why the native runtime cannot be used, or None if it can."""
    if precision != "int8":
        return f"it computes in int8, and the precision is {precision}"
    if library_file() is None:
        return "it is not built: install the project again where a C compiler is (Debian: gcc)"
    return unsuitable(config)


def load_runtime(
    folder: ModelFolder, *, slots: int = 16, threads: int = 1, precision: str = "int8", runtime: RuntimeChoice = "auto"
) -> Runtime:
    """The embedded runtime of an opened folder; its `name` says which one it is.

    Args:
        threads: of ONNX Runtime; the native runtime has one.
        runtime: `auto` takes the native one where it can be used, else ONNX Runtime.

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


def load_torch_runtime(folder: ModelFolder, *, slots: int = 16, device: str = "cuda") -> "TorchRuntime":
    """The PyTorch runtime of an opened folder; on a GPU it samples there too. Raises `ModelError`."""
    try:
        from model.runtimes.torch.runtime import DeviceRuntime, TorchRuntime, find_device
    except ImportError as error:
        raise ModelError(f"writing on {device} needs PyTorch and safetensors, and {error.name} is missing") from None
    kind = DeviceRuntime if find_device(device).type == "cuda" else TorchRuntime
    return kind.load(folder.path, max_batch=slots, device=device)


def load_engine(
    folder: Path | None = None,
    *,
    slots: int = 16,
    threads: int = 1,
    precision: str = "int8",
    runtime: RuntimeChoice = "auto",
    queue_limit: int = 64,
) -> Engine:
    """An engine over a model folder made by `story export`; use it as a context manager.

    Its `runtime_name` says which runtime it uses: with another one the same seed may give another story.

    Args:
        folder: None takes the shipped model.
        slots: stories generated at once; at most `queue_limit` more wait.
        threads, precision, runtime: see `load_runtime`.

    Raises:
        ModelError: the folder is missing, damaged or of another format, or the runtime cannot be had.
    """
    opened = ModelFolder.open(folder or PRETRAINED)
    loaded = load_runtime(opened, slots=slots, threads=threads, precision=precision, runtime=runtime)
    return _engine(opened, loaded, queue_limit)


def load_bare_engine(folder: Path, *, slots: int = 1) -> Engine:
    """An engine over `config.json`, `model.safetensors` and `tokenizer.json` alone, as a checkpoint holds them.

    It writes what `load_engine` writes from the folder that is exported of these weights in half precision. Without
    decode graphs there is only the native runtime. Raises `ModelError` where that cannot be used, or a file cannot.
    """
    config = read_sizes(folder)
    if reason := why_not_native(config, "int8"):
        raise ModelError(f"weights without decode graphs need the native runtime, which cannot be used: {reason}")
    from model.runtimes.native.runtime import NativeRuntime

    runtime = NativeRuntime(folder / "model.safetensors", config, max_batch=slots)
    return Engine(runtime, StoryTokenizer.load(folder / "tokenizer.json"), queue_limit=0)


def warm_up(engine: Engine) -> Completion:
    """Write a few tokens, always the same ones. Raises `ModelError` when the model cannot."""
    greedy = SamplingParams(temperature=0)
    stream = engine.submit(GenerationRequest(prompt="Once upon a time", max_tokens=16, sampling=greedy))
    try:
        completion = stream.wait(WARM_UP_SECONDS)
    except TimeoutError:
        raise ModelError(f"it wrote nothing within {WARM_UP_SECONDS:.0f} s") from None
    if completion.error is not None or not completion.usage.completion_tokens:
        raise ModelError(f"it cannot write: {completion.error or 'the story ends before its first token'}")
    return completion


def load_torch_engine(
    folder: Path | None = None, *, slots: int = 16, device: str = "cuda", queue_limit: int = 64
) -> Engine:
    """`load_engine` over PyTorch, for machines with a GPU: `device` is `cuda`, or `cpu` (slow). Raises `ModelError`."""
    opened = ModelFolder.open(folder or PRETRAINED)
    loaded = load_torch_runtime(opened, slots=slots, device=device)
    return _engine(opened, loaded, queue_limit)


def _engine(folder: ModelFolder, runtime: Runtime, queue_limit: int) -> Engine:
    return Engine(runtime, StoryTokenizer.load(folder.tokenizer), queue_limit=queue_limit)
