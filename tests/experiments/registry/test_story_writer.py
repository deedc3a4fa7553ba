"""A registered version writes what the engine writes, without torch and without this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.models import Model

from experiments.registry.versions import Version
from model.engine.load import load_engine
from model.generation import GenerationRequest, SamplingParams
from model.serving.http.server import free_port
from tests.model.small_model import small_folder
from training.tracking.store import open_store

PROMPTS = ("Once upon a time", "The fox")
USUAL = SamplingParams().temperature

LOAD = """
import json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "gradio", "training", "experiments", "demo"):
            raise ImportError(f"{name} is not part of a version")

sys.meta_path.insert(0, NoTorch())
import pandas as pd
from mlflow import pyfunc
model = pyfunc.load_model(sys.argv[1])
frame = pd.DataFrame(json.loads(sys.argv[2]))
rows = model.predict(frame, params={"max_tokens": 24}).to_dict("records")
few = {"max_tokens": 24}
unseeded = model.predict({"prompt": ["The fox"] * 3}, params=few).to_dict("records")
again = model.predict([{"prompt": "The fox", "seed": unseeded[1]["seed"]}], params=few)
stops = {
    "param": model.predict([{"prompt": frame.prompt[0], "seed": 5}], params={**few, "stop": ["e"]}),
    "column": model.predict([{"prompt": frame.prompt[0], "seed": 5, "stop": ["e", "zzz"]}], params=few),
    "text": model.predict({"prompt": [frame.prompt[0]], "seed": [5], "stop": ["e"]}, params=few),
}
stopped = {name: found.story[0] for name, found in stops.items()}
chunks = list(model.predict_stream({"prompt": frame.prompt[0], "seed": 5}, params={"max_tokens": 24}))
try:
    model.predict(["The fox", "Mia"])
except Exception as error:
    refused = str(error)
origins = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "model"]
answer = {"rows": rows, "chunks": chunks, "origins": origins, "unseeded": unseeded, "again": again.story[0]}
print(json.dumps(answer | {"stopped": stopped, "refused": refused}))
"""


def alone(prompt: str, seed: int, tokens: int = 24) -> str:
    with load_engine(small_folder()) as engine:
        return (
            engine.submit(GenerationRequest(prompt=prompt, max_tokens=tokens, sampling=SamplingParams(seed=seed)))
            .wait(20)
            .text
        )


@pytest.fixture(scope="module")
def elsewhere(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the version answers in a process that has nothing of this project but what the version brings."""
    frame = {
        "prompt": [*PROMPTS, "Mia"],
        "seed": [5, 6, None],  # a gap makes a column of floats
        "temperature": [USUAL, USUAL, 9.0],
    }
    run = subprocess.run(
        [sys.executable, "-B", "-c", LOAD, str(package), json.dumps(frame)],  # -B: no bytecode in the version
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def test_each_row_is_the_story_that_the_engine_writes_for_its_seed(elsewhere: dict[str, Any]) -> None:
    stories = [row["story"] for row in elsewhere["rows"][:2]]
    assert stories == [alone(PROMPTS[0], 5), alone(PROMPTS[1], 6)]
    assert all(0 < row["tokens"] <= 24 and not row["error"] for row in elsewhere["rows"][:2])


def test_rows_without_a_seed_have_one_each_which_gives_the_story_again(elsewhere: dict[str, Any]) -> None:
    rows = elsewhere["unseeded"]
    assert len({row["seed"] for row in rows}) == len({row["story"] for row in rows}) == 3
    assert elsewhere["again"] == rows[1]["story"]
    assert [row["seed"] for row in elsewhere["rows"][:2]] == [5, 6]


def test_a_stop_string_ends_the_story_as_column_and_as_parameter(elsewhere: dict[str, Any]) -> None:
    whole = alone(PROMPTS[0], 5)
    assert "e" in whole
    assert set(elsewhere["stopped"].values()) == {whole[: whole.index("e")]}


def test_the_version_knows_its_own_address(registered: tuple[str, Version], package: Path) -> None:
    uri, version = registered
    described = Model.load(str(package))
    assert described.run_id == version.run_id
    assert described.model_id is not None
    logged = open_store(uri).get_logged_model(described.model_id)
    assert logged.model_uri == f"models:/{described.model_id}"
    assert Path(logged.artifact_location.removeprefix("file://")) == package


def test_a_row_that_is_not_allowed_says_so_and_the_others_are_written(elsewhere: dict[str, Any]) -> None:
    bad = elsewhere["rows"][2]
    assert (bad["story"], bad["finish_reason"]) == ("", "error")
    assert bad["error"] == "temperature must be between 0 and 2, got 9.0"


def test_a_list_of_texts_is_refused_by_the_name_of_the_missing_column(elsewhere: dict[str, Any]) -> None:
    assert "missing inputs ['prompt']" in elsewhere["refused"]


def test_a_streamed_story_comes_in_chunks_and_is_the_complete_one(elsewhere: dict[str, Any]) -> None:
    assert all(elsewhere["chunks"])  # how many they are depends on who is faster, the engine or the client
    assert "".join(elsewhere["chunks"]) == elsewhere["rows"][0]["story"]


def test_the_version_names_what_it_needs_and_torch_is_not_among_it(package: Path) -> None:
    needs = {line.partition("==")[0] for line in (package / "requirements.txt").read_text().split()}
    assert needs == {"mlflow", "numpy", "onnxruntime", "pandas", "tokenizers"}
    carried = {str(path.relative_to(package / "code")) for path in (package / "code").rglob("*")}
    parts = {name.split("/")[1] for name in carried if name.count("/") == 1}
    assert parts == {"__init__.py", "errors.py", "generation.py", "wishes.py", "architecture", "runtimes", "engine"}


def test_the_code_that_runs_is_the_versions_own(elsewhere: dict[str, Any], package: Path) -> None:
    assert {Path(name).is_relative_to(package / "code/model") for name in elsewhere["origins"]} == {True}


@pytest.mark.slow
def test_mlflow_serves_the_version_over_http(package: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(package), "--env-manager", "local"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        body = {"dataframe_records": [{"prompt": PROMPTS[0], "seed": 5}], "params": {"max_tokens": 24}}
        deadline = time.monotonic() + 90
        while True:
            try:
                answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=30)
                break
            except httpx.ConnectError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.3)
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["story"] == alone(PROMPTS[0], 5)
    finally:
        os.killpg(server.pid, 15)
        server.wait(20)
