"""From a model folder to stories: the serving path whole, with nothing of training in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.architecture.folder import ModelFolder
from model.engine.load import RuntimeChoice, load_engine, load_runtime
from model.errors import ModelError
from model.generation import Completion, GenerationRequest, SamplingParams
from model.runtimes.native.library import library
from tests.model.runtimes.shared import NOT_NATIVE, needs_native
from tests.model.small_model import copy_of, small_folder

REQUEST = GenerationRequest(prompt="Once upon a time", max_tokens=40, sampling=SamplingParams(seed=3))


def write(
    folder: Path | None, *, precision: str = "int8", runtime: RuntimeChoice = "auto", others: int = 0
) -> Completion:
    beside = [
        GenerationRequest(prompt=f"The dog {n}", max_tokens=20 + n, sampling=SamplingParams(seed=n))
        for n in range(others)
    ]
    with load_engine(folder, slots=8, precision=precision, runtime=runtime) as engine:
        streams = [engine.submit(each) for each in (REQUEST, *beside)]
        for stream in streams:
            stream.wait()
        return streams[0].completion


WRITE_ONE = """
import json, sys
from model.generation import GenerationRequest
from model.engine.load import load_engine
with load_engine() as engine:
    stream = engine.submit(GenerationRequest(prompt="Once upon a time", max_tokens=20))
    text = "".join(chunk.text for chunk in stream)
    usage = stream.completion.usage
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"text": text, "tokens": usage.completion_tokens, "loaded": loaded}))
"""


def test_the_shipped_model_writes_without_anything_of_training_being_imported(repository: Path) -> None:
    run = subprocess.run([sys.executable, "-c", WRITE_ONE], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["text"].strip()
    assert 0 < found["tokens"] <= 20
    assert ("onnxruntime" in found["loaded"]) == (NOT_NATIVE is not None)  # only one of them is loaded
    training = {"torch", "onnx", "mlflow", "safetensors", "training", "experiments", "demo", "gradio", "pandas"}
    assert set(found["loaded"]) & training == set()


def test_a_folder_works_wherever_it_is_copied_to(tmp_path: Path) -> None:
    away = copy_of(small_folder(), tmp_path / "first")
    expected = write(small_folder())
    moved = away.rename(tmp_path / "second")
    assert write(moved).text == expected.text
    assert not any(str(small_folder()).encode() in path.read_bytes() for path in moved.iterdir())


@pytest.mark.parametrize(("precision", "runtime"), [("int8", "auto"), ("int8", "onnx"), ("fp32", "onnx")])
def test_a_seed_gives_the_same_story_alone_and_among_others(precision: str, runtime: RuntimeChoice) -> None:
    alone = write(small_folder(), precision=precision, runtime=runtime)
    among = write(small_folder(), precision=precision, runtime=runtime, others=7)
    assert alone.text
    assert (among.text, among.finish_reason) == (alone.text, alone.finish_reason)


def test_a_folder_that_is_replaced_goes_on_being_served(tmp_path: Path) -> None:
    """A new export may take the place of a folder whose weights are mapped into a running process."""
    folder = copy_of(small_folder(), tmp_path / "model")
    expected = write(folder, precision="fp32").text
    with load_engine(folder, slots=1, precision="fp32") as engine:
        shutil.rmtree(folder)
        assert "".join(chunk.text for chunk in engine.submit(REQUEST)) == expected


def test_a_damaged_folder_is_named_and_never_served(tmp_path: Path) -> None:
    folder = copy_of(small_folder(), tmp_path / "tale")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=r"tale is damaged"):
        load_engine(folder)


def test_slots_and_precision_reach_the_runtime() -> None:
    opened = ModelFolder.open(small_folder())
    assert load_runtime(opened, slots=3).max_batch == 3
    with load_engine(small_folder(), slots=3, queue_limit=5) as engine:
        stats = engine.stats()
        assert (stats.slots, stats.queue_limit) == (3, 5)
    with pytest.raises(ModelError, match="precision must be one of int8, fp32, got 'int4'"):
        load_engine(small_folder(), precision="int4")


def runtime_name(precision: str = "int8", runtime: RuntimeChoice = "auto") -> str:
    with load_engine(small_folder(), slots=1, precision=precision, runtime=runtime) as engine:
        return engine.runtime_name


@needs_native
def test_the_native_runtime_writes_where_it_can_and_onnx_runtime_where_it_is_asked_to() -> None:
    assert runtime_name().startswith("native int8 ")
    assert runtime_name(runtime="native") == runtime_name()
    assert runtime_name(runtime="onnx") == "onnx int8"
    assert runtime_name("fp32") == "onnx fp32"


def test_without_the_library_onnx_runtime_writes_and_native_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.engine.load.library_file", lambda: None)
    assert runtime_name() == "onnx int8"
    with pytest.raises(ModelError, match="the native runtime cannot be used: it is not built: install the"):
        load_engine(small_folder(), runtime="native")


def test_the_native_runtime_in_fp32_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be used: it computes in int8, and the precision is fp32"):
        load_engine(small_folder(), precision="fp32", runtime="native")


@needs_native
def test_without_a_library_that_loads_its_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr("model.runtimes.native.library.library_file", lambda: broken)
    with pytest.raises(ModelError, match=r"the native runtime in _native\.so cannot be loaded: "):
        library.__wrapped__()
    monkeypatch.setattr("model.runtimes.native.library.library_file", lambda: None)
    with pytest.raises(ModelError, match="the native runtime is not built"):
        library.__wrapped__()
