"""The Dockerfiles and the build context: what they may use, and what an image is made of."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from tests.deploy.dockerfiles import instructions, stages

DOCKERFILES = ("Dockerfile", "deploy/mlflow/Dockerfile")
KNOWN = {"FROM", "RUN", "ENV", "COPY", "WORKDIR", "LABEL", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
"""What every builder understands."""


@pytest.fixture(params=DOCKERFILES)
def dockerfile(request: pytest.FixtureRequest, repository: Path) -> Path:
    path: Path = repository / request.param
    return path


def tracked(repository: Path) -> set[str]:
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=True,
    )
    return {name for name in listed.stdout.decode().split("\0") if name and (repository / name).is_file()}


def context(repository: Path) -> set[str]:
    """The files that Docker's own client would send, by its own reading of .dockerignore."""
    patterns = (repository / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line for line in patterns if line and not line.startswith("#")]
    return {name for name in exclude_paths(str(repository), patterns) if (repository / name).is_file()}


def test_they_use_nothing_that_needs_one_certain_builder(dockerfile: Path) -> None:
    text = dockerfile.read_text("utf-8")
    assert "<<" not in text, "a heredoc"
    assert "# syntax" not in text
    assert {name for name, _ in instructions(dockerfile)} <= KNOWN
    options = re.findall(r"^(?:RUN|COPY|FROM) (--[a-z]+)", text, flags=re.MULTILINE)
    assert set(options) <= {"--mount", "--from"}
    assert {base for name, base in instructions(dockerfile) if name == "FROM"} <= {
        "python:3.12-slim",
        "python:3.12-slim AS build",
    }


def test_they_run_as_a_user_with_a_fixed_number_and_start_without_a_shell(dockerfile: Path) -> None:
    last = stages(dockerfile)[-1]
    assert [arguments for name, arguments in last if name == "USER"] == ["10001:10001"]
    (start,) = (arguments for name, arguments in last if name == "CMD")
    assert isinstance(json.loads(start), list)


def test_nothing_secret_is_written_into_them(dockerfile: Path) -> None:
    given = [f"{name} {text}" for name, text in instructions(dockerfile) if name in ("ENV", "ARG", "LABEL")]
    assert [line for line in given if re.search("(?i)secret|token|passw|_key|://", line)] == []


def test_the_app_honours_its_port_and_is_checked_without_curl(repository: Path) -> None:
    last = dict(stages(repository / "Dockerfile")[-1])
    assert json.loads(last["CMD"]) == ["story", "demo", "--host", "0.0.0.0"]  # and PORT, of the environment
    _, _, check = last["HEALTHCHECK"].partition("CMD ")
    assert json.loads(check) == ["python", "/opt/story/app/deploy/image/healthy.py"]


def test_the_apps_image_gets_nothing_of_the_compiler_and_installs_nothing(repository: Path) -> None:
    build, last = stages(repository / "Dockerfile")
    assert any("apt-get install" in text for _, text in build)
    assert [text for name, text in last if name == "RUN" and re.search("apt|pip", text)] == []
    copied = [text for name, text in last if name == "COPY"]
    assert all(text.startswith("--from=build /opt/story/") for text in copied)


def test_the_decoder_in_c_is_built_for_any_processor(repository: Path) -> None:
    flags = (repository / "setup.py").read_text("utf-8").partition("FLAGS = [")[2].partition("]")[0]
    assert "-O3" in flags
    assert "-m" not in re.findall(r'"(-m)', flags), "an option for one kind of processor"


def test_what_is_written_has_a_place_outside_the_root(repository: Path) -> None:
    (environment,) = (text for name, text in stages(repository / "Dockerfile")[-1] if name == "ENV")
    given = dict(pair.split("=", 1) for pair in environment.split())
    assert (given["HOME"], given["GRADIO_TEMP_DIR"], given["XDG_STATE_HOME"]) == (
        "/tmp",
        "/tmp/gradio",
        "/var/lib",
    )
    assert given["PYTHONDONTWRITEBYTECODE"] == "1"
    assert given["STAGE"] == "PROD"


def test_the_build_gets_just_what_the_dockerfiles_copy(repository: Path) -> None:
    sent = context(repository)
    wanted = {"Dockerfile", ".dockerignore"}  # always sent
    for dockerfile in DOCKERFILES:
        for name, arguments in instructions(repository / dockerfile):
            if name == "COPY" and "--from" not in arguments:
                for source in arguments.split()[:-1]:
                    wanted |= {name for name in tracked(repository) if f"{name}/".startswith(f"{source}/")}
    assert sent == wanted
    assert sum(os.path.getsize(repository / name) for name in sent) < 25e6


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "model/.env",
        "deploy/secrets/redis_url",
        "mlflow.db",
        "demo/stories.db",
        "model/_native.cpython-312.so",
    ],
)
def test_what_a_machine_made_for_itself_is_not_sent(name: str, repository: Path, tmp_path: Path) -> None:
    patterns = (repository / ".dockerignore").read_text("utf-8").splitlines()
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "story.py").touch()
    assert name not in exclude_paths(str(tmp_path), [line for line in patterns if line[:1] not in ("", "#")])
    assert "story.py" in exclude_paths(
        str(tmp_path), [line for line in patterns if line[:1] not in ("", "#")]
    )
