"""From a model folder to stories: the serving path whole, with nothing of training in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import ModelError
from model.folder import ModelFolder
from model.generation import Completion, Request, Sampling
from model.load import load_engine, load_runtime
from tests.model.small_model import copy_of, small_folder

REQUEST = Request(prompt="Once upon a time", max_tokens=40, sampling=Sampling(seed=3))


def write(folder: Path | None, *, precision: str = "int8", others: int = 0) -> Completion:
    with load_engine(folder, slots=8, precision=precision) as engine:
        stream = engine.submit(REQUEST)
        company = [
            engine.submit(Request(prompt=f"The dog {n}", max_tokens=20 + n, sampling=Sampling(seed=n)))
            for n in range(others)
        ]
        for beside in [stream, *company]:
            for _ in beside:
                pass
        return stream.completion


WRITE_ONE = """
import json, sys
from model.generation import Request
from model.load import load_engine
with load_engine() as engine:
    stream = engine.write(Request(prompt="Once upon a time", max_tokens=20))
    text = "".join(piece.text for piece in stream)
    usage = stream.completion.usage
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"text": text, "tokens": usage.completion_tokens, "loaded": loaded}))
"""


def test_the_shipped_model_writes_without_anything_of_training_being_imported(repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WRITE_ONE], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["text"].strip()
    assert 0 < told["tokens"] <= 20
    assert "onnxruntime" in told["loaded"]
    training = {
        "torch",
        "onnx",
        "mlflow",
        "safetensors",
        "training",
        "experiments",
        "demo",
        "gradio",
        "pandas",
    }
    assert set(told["loaded"]) & training == set()


def test_a_folder_works_wherever_it_is_copied_to(tmp_path: Path) -> None:
    away = copy_of(small_folder(), tmp_path / "first")
    expected = write(small_folder())
    moved = away.rename(tmp_path / "second")
    assert write(moved).text == expected.text
    assert not any(str(small_folder()).encode() in path.read_bytes() for path in moved.iterdir())


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_seed_tells_the_same_story_alone_and_among_others(precision: str) -> None:
    alone = write(small_folder(), precision=precision)
    among = write(small_folder(), precision=precision, others=7)
    assert alone.text
    assert (among.text, among.finish_reason) == (alone.text, alone.finish_reason)


def test_a_folder_that_is_replaced_goes_on_being_served(tmp_path: Path) -> None:
    """A new export may take the place of a folder whose weights are mapped into a running process."""
    folder = copy_of(small_folder(), tmp_path / "model")
    expected = write(folder, precision="fp32").text
    with load_engine(folder, slots=1, precision="fp32") as engine:
        shutil.rmtree(folder)
        assert "".join(piece.text for piece in engine.write(REQUEST)) == expected


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
