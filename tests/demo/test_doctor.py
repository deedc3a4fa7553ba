"""The doctor: each thing that can be missing, made missing, and what is then said of it."""

from __future__ import annotations

import socket
from importlib import metadata
from pathlib import Path

import pytest

from demo.doctor import Finding, examine, stories_can_be_written
from model.architecture.folder import PRETRAINED
from model.errors import ModelError
from tests.model.serving.http.serving import paced, serving


def _named(name: str) -> Finding:
    return next(finding for finding in examine() if finding.name == name)


def test_a_missing_package_is_named_with_what_it_would_give_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "mlflow":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("demo.doctor.metadata.version", version)
    finding = _named("train")
    assert (finding.state, finding.detail) == ("missing", "without mlflow")
    assert "story train" in finding.gives or "`train`" in finding.gives
    assert "pip install -e '.[train]' -c constraints.txt" in finding.gives


def test_installed_packages_are_reported_with_their_versions() -> None:
    finding = _named("serving")
    assert finding.state == "ok"
    for name in ("gradio", "onnxruntime", "tokenizers"):
        assert f"{name} {metadata.version(name)}" in finding.detail


def test_a_mistyped_setting_ends_the_examination_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_THRAEDS", "2")
    findings = examine()
    assert findings[-1].state == "wrong"
    assert findings[-1].detail == "STORY_THRAEDS is not a setting; the nearest is STORY_THREADS"
    assert not stories_can_be_written(findings)


def test_a_model_that_is_not_there_means_no_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_MODEL", str(tmp_path / "nowhere"))
    findings = examine()
    model = next(finding for finding in findings if finding.name == "model")
    assert model.state == "wrong"
    assert "nowhere" in model.detail
    assert not stories_can_be_written(findings)


def test_a_champion_that_cannot_be_asked_for_is_said_and_stories_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_MODEL", "models:/story-writer@champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    finding = _named("model")
    assert finding.state == "ok"
    assert finding.detail.endswith("; the champion is not known: the MLflow server does not answer: ConnectError")


def test_the_shipped_model_writes() -> None:
    finding = _named("model")
    assert finding.state == "ok", finding.detail
    digest = (PRETRAINED / "digest").read_text("ascii").strip()
    assert finding.detail.startswith(f"the model that ships with this repository (digest {digest[:12]}), ")
    assert " int8" in finding.detail
    assert ": wrote 16 tokens at " in finding.detail


def test_the_runtime_that_writes_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_RUNTIME", "onnx")
    assert "onnx int8: wrote 16 tokens" in _named("model").detail


def test_a_native_runtime_that_was_not_built_is_reported_with_what_it_would_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unbuilt() -> dict[str, int]:
        raise ModelError("the native runtime is not built: install the project again where a C compiler is")

    monkeypatch.setattr("model.runtimes.native.library.paths", unbuilt)
    finding = _named("native")
    assert finding.state == "missing"
    assert "is not built" in finding.detail
    assert "speed" in finding.gives


def test_a_taken_port_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("PORT", str(port))
        assert _named("port").state == "off"
        assert f"127.0.0.1:{port} is taken" in _named("port").detail
    assert _named("port").state == "ok"


def test_the_store_of_runs_is_off_until_it_exists(tmp_path: Path) -> None:
    assert _named("mlflow").state == "off"
    (tmp_path / "mlflow.db").touch()
    assert _named("mlflow").state == "ok"


def test_a_service_that_answers_is_reported_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(paced()[0]) as running:
        monkeypatch.setenv("MODAL_ENDPOINT_URL", running.url)
        monkeypatch.setenv("USE_MODAL", "true")
        finding = _named("endpoint")
    assert finding.state == "ok"
    assert finding.detail == (
        f"{running.url}, without a proxy token, used by `--backend auto`: answers, with a network without training "
        "(version 0123456789ab)"
    )


def test_a_service_that_does_not_answer_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MODAL_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("demo.doctor.MODAL_PATIENCE", 0.2)
        finding = _named("endpoint")
    assert finding.state == "off"
    assert finding.detail.endswith("ReadTimeout: timed out")
    assert "it may be starting" in finding.gives


def test_no_secret_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MODAL_ENDPOINT_URL": "http://lily:hunter2@127.0.0.1:1",
        "MODAL_KEY": "wk-1",
        "MODAL_SECRET": "hunter2",
        "MLFLOW_TRACKING_URI": "postgresql://lily:hunter2@db.example/runs",
        "DATABASE_URL": "postgresql://lily:hunter2@db.example/app",
    }.items():
        monkeypatch.setenv(name, value)
    report = str(examine())
    assert "http://…@127.0.0.1:1, with a proxy token, not used: USE_MODAL is off: ConnectError" in report
    assert "postgresql://…@db.example/runs" in report
    assert "hunter2" not in report


def test_whatever_is_not_in_order_says_what_it_would_give() -> None:
    assert [finding.name for finding in examine() if finding.state != "ok" and not finding.gives] == []
