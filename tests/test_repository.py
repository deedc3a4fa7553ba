"""Rules that no other tool checks: what a process really loads, what files may hold, exact versions."""

from __future__ import annotations

import ast
import json
import os
import pwd
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = ("model", "training", "experiments", "demo", "deploy")

NEEDS_TORCH = ("model.architecture.network", "model.architecture.network", "model.runtimes.torch")
"""Modules and packages of `model` that import torch; serving on a CPU imports none of them."""

LONGEST_FILE = 500

# Put together here, so that this file does not hold what it looks for.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("download", "pytorch", "org"),
        ("deb", "debian", "org"),
        ("archive", "ubuntu", "com"),
        ("proxy", "golang", "org"),
    )
]
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("work", "root", "Users", "private")) + r")/[\w.-]+")
"""Folders that stand for one machine anywhere; this machine's own are looked for as they are."""


@pytest.fixture(scope="session")
def tracked(repository: Path) -> list[Path]:
    """The files that are in the repository or would be at the next commit."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=True,
    )
    paths = [repository / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def _text_of(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None  # a picture, a model, a compressed corpus


def _modules(repository: Path, *packages: str) -> Iterator[tuple[str, Path]]:
    for package in packages:
        for path in sorted((repository / package).rglob("*.py")):
            name = ".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__")
            yield name, path


def _loaded_by(repository: Path, program: str) -> set[str]:
    """The top-level packages in `sys.modules` of a new process that has run `program`."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    run = subprocess.run(
        [sys.executable, "-c", program + report], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_serving_loads_neither_torch_nor_mlflow(repository: Path) -> None:
    names = ["story", *(name for name, _ in _modules(repository, "model", "demo") if not name.startswith(NEEDS_TORCH))]
    # What only the set for training brings is not there where one serves; libraries may do without it, we have to.
    absent = "import sys\nsys.modules.update(dict.fromkeys(['psutil', 'optuna', 'safetensors', 'pyarrow']))\n"
    loaded = _loaded_by(repository, absent + "\n".join(f"import {name}" for name in names))
    assert {"model", "demo"} <= loaded
    assert loaded & {"torch", "mlflow", "matplotlib", "sklearn"} == set()


def test_help_loads_nothing_heavy(repository: Path) -> None:
    program = "import story\ntry:\n    story.app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0"
    loaded = _loaded_by(repository, program)
    heavy = {"torch", "mlflow", "gradio", "onnxruntime", "onnx", "numpy", "tokenizers", "pydantic", "httpx", "rich"}
    # rich draws the help itself; every other one belongs to a verb.
    assert loaded & heavy <= {"rich"}


def test_no_file_names_a_package_registry_or_a_path_of_one_machine(repository: Path, tracked: list[Path]) -> None:
    here = [f"{repository}/", f"{pwd.getpwuid(os.getuid()).pw_dir}/"]
    found = []
    for path in tracked:
        for number, line in enumerate((_text_of(path) or "").splitlines(), 1):
            place = f"{path.relative_to(repository)}:{number}"
            found += [f"{place} {text}" for text in (*REGISTRY_HOSTS, *here) if text in line]
            found += [f"{place} {match}" for match in MACHINE_PATH.findall(line)]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("open('/" + "Users/lily/model')", True),
        ("cd /" + "work/main", True),
        ("see ~/" + "work/notes and a/" + "work/b", False),
        ("an address such as http://127.0.0.1/" + "work/", False),
    ],
)
def test_a_path_of_one_machine_is_recognised(line: str, is_one: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == is_one


def test_no_file_is_longer_than_500_lines(repository: Path, tracked: list[Path]) -> None:
    lengths = {
        str(path.relative_to(repository)): path.read_bytes().count(b"\n") for path in tracked if path.suffix == ".py"
    }
    assert "story.py" in lengths
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_every_module_says_why_it_exists(repository: Path) -> None:
    modules = [("story", repository / "story.py"), *_modules(repository, *PACKAGES)]
    silent = [name for name, path in modules if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert silent == []


def _requirements(repository: Path) -> list[Requirement]:
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines if not line.startswith(project["name"])]


def _constraints(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "a constraint is NAME==VERSION"
    return {canonicalize_name(name): version for name, version in pins}


def test_every_requirement_has_an_exact_version_that_it_allows(repository: Path) -> None:
    exact = _constraints(repository)
    for requirement in _requirements(repository):
        version = exact.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_the_constraints_hold_no_addresses_and_no_local_versions(repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if "/" in line or "@" in line or "+" in line] == []
    names = [line.partition("==")[0] for line in pins]
    assert names == sorted(names), "kept in alphabetical order, so that a change is easy to read"


def test_serving_needs_neither_torch_nor_mlflow_installed(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    names = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert names & {"torch", "mlflow", "onnx", "modal"} == set()


def test_pre_commit_fetches_nothing(repository: Path) -> None:
    text = (repository / ".pre-commit-config.yaml").read_text("utf-8")
    assert re.findall(r"repo: *(\S+)", text) == ["local"]
    assert "://" not in text


@pytest.mark.parametrize("ci", [None, "true"])
def test_the_tests_start_with_and_without_the_mark_of_a_ci_machine(ci: str | None, repository: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    if ci is not None:
        environment["CI"] = ci
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/model/engine/test_stop.py"]
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
