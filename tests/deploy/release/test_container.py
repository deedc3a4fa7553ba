"""What a GPU container runs, on the CPU: started in two halves, it writes, and ends without breaking a story."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy import modal_app
from deploy.release.container import Container
from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import ModelError
from tests.deploy.conftest import Run

DIGEST = (PRETRAINED / "digest").read_text("ascii").strip()


def started() -> Container:
    made = Container(folder=PRETRAINED, revision=DIGEST, name="green", slots=2, queue=1, drain=20, device="cpu")
    made.prepare()
    made.listen("127.0.0.1", 0)
    return made


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    made = started()
    yield made
    made.close()


def test_it_serves_the_revision_under_its_deployment(container: Container) -> None:
    answer = httpx.get(f"{container.url}/api/health", timeout=30)
    body = answer.json()
    assert (answer.status_code, body["status"], body["backend"]) == (200, "healthy", "green")
    assert body["model"]["version"] == ModelFolder.open(PRETRAINED).digest
    assert (body["engine"]["slots"], body["capacity"]) == (2, 3)


def test_it_generates_with_the_engine_that_a_gpu_would_have(container: Container) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{container.url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"].startswith(", there was a little")
    assert answer["usage"]["completion_tokens"] == 12


def test_a_running_request_finishes_when_it_closes() -> None:
    container = started()
    body = {"prompt": "The boat", "max_tokens": 120, "stream": True, "seed": 3}
    url = f"{container.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as running:
        lines = running.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        closing = threading.Thread(target=container.close)
        closing.start()
        while httpx.get(f"{container.url}/api/health", timeout=30).json()["status"] != "draining":
            time.sleep(0.02)
        refused = httpx.post(url, json={**body, "stream": False}, timeout=30)
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    closing.join(30)
    assert refused.status_code == 503
    assert events[-1] == "[DONE]"
    assert any(choice["finish_reason"] for choice in json.loads(events[-2])["choices"])
    assert not closing.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{container.url}/api/health", timeout=None)
    container.close()  # harmless twice


def test_another_revision_than_the_deployed_one_is_refused() -> None:
    with pytest.raises(ModelError, match=f"holds {DIGEST[:12]}, but ffffffffffff was deployed"):
        Container(folder=PRETRAINED, revision="f" * 64, name="blue", slots=1, queue=0, drain=1).prepare()


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a model folder"):
        Container(folder=tmp_path / "none", revision=DIGEST, name="blue", slots=1, queue=0, drain=1).prepare()


def test_the_image_holds_all_that_the_container_imports(run: Run) -> None:
    """Whatever belongs to a package outside the image's own and their requirements cannot be imported here."""
    program = f"""
import importlib.abc, importlib.metadata as metadata, re, sys
from pathlib import Path

def closure(names):
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            if "extra ==" not in line:
                try:
                    metadata.version(needed := re.match(r"[\\w.-]+", line)[0])
                except metadata.PackageNotFoundError:
                    continue
                todo.append(needed)
    return found

image = closure({modal_app.SERVING!r})
owners = metadata.packages_distributions()
absent = {{top for top, names in owners.items()
          if not any(re.sub(r"[-_.]+", "-", name).lower() in image for name in names)}}
absent -= {{"model", "deploy"}}

class OnlyTheImage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"not in the image: {{name}}", name=name)

sys.meta_path.insert(0, OnlyTheImage())
assert "gradio" in absent and "mlflow" in absent
from deploy.release.container import Container
where = {{"folder": Path({str(PRETRAINED)!r}), "revision": {DIGEST!r}, "name": "blue", "device": "cpu"}}
container = Container(**where, slots=1, queue=0, drain=1)
container.prepare()
assert {{"torch", "uvicorn"}} <= set(sys.modules), "the snapshot would not hold them"
container.listen("127.0.0.1", 0)
container.close()
print("served")
"""
    done = run("-c", program)
    assert done.stdout == "served\n", done.stderr
