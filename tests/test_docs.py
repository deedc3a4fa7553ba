"""The README and the manual match the code: commands parse, names exist, tables are current, examples run."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import model.serving.http
import story
from deploy import modal_app
from model.reference import TABLES, with_tables
from model.serving.backend import LocalBackend
from model.serving.http.__main__ import app as service
from model.settings import Settings, environment_names, load_settings, secret_names
from tests.model.serving.http.serving import Running, serving
from training.trainer.recipe import preset_names

REPOSITORY = Path(__file__).resolve().parents[1]
MANUAL = sorted(path for path in (REPOSITORY / "docs").glob("*.md") if not path.is_symlink())
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *MANUAL]
TEXT = {path.name: path.read_text("utf-8") for path in PAGES}
README = TEXT["README.md"]
ALL = "\n".join(TEXT.values())
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
PACKAGES = "model|training|experiments|demo|deploy|docs|tests|notebooks|.github"
MADE = ("deploy/secrets/", "experiments/record.json.gz")
"""Paths that the documents name and that are made later."""


def blocks(language: str) -> list[str]:
    """The code blocks of a language in all pages."""
    return re.findall(rf"^```{language}\n(.*?)^```", ALL, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of all `sh` blocks, without comments, each one once."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.partition(" #")[0].split("&&")]
    return sorted({" ".join(part.split()) for part in parts if part})


def starting(*words: str) -> list[str]:
    """The commands that begin with one of `words`, environment assignments aside."""
    return [line for line in commands() if without_environment(line)[0] in words]


def without_environment(line: str) -> list[str]:
    """The words of a command after its `NAME=value` assignments."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def parse(command: Any, arguments: list[str]) -> None:
    """Parse and convert arguments as a Typer command does; run nothing. A usage error is raised."""
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        command = command.commands[arguments.pop(0)]
    command.make_context(command.name, arguments, resilient_parsing="--help" in arguments)


def verbs(command: Any = None, name: str = "story") -> Iterator[tuple[str, Any]]:
    """Each command of the command line with its name, `story deploy switch`."""
    command = command or get_command(story.app)
    yield name, command
    for verb, below in getattr(command, "commands", {}).items():
        yield from verbs(below, f"{name} {verb}")


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    here = {"story", "make", "python", "python3", ".venv/bin/python", "modal", "curl"}
    elsewhere = {"docker", "promtool", ".venv/bin/jupyter", "."}
    assert {without_environment(line)[0] for line in commands()} <= here | elsewhere


@pytest.mark.parametrize("line", starting("story"))
def test_a_story_command_parses(line: str) -> None:
    parse(get_command(story.app), without_environment(line)[1:])


@pytest.mark.parametrize("line", [line for line in commands() if without_environment(line) != shlex.split(line)])
def test_the_environment_of_a_command_is_valid(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    for word in words[: len(words) - len(without_environment(line))]:
        name, _, value = word.partition("=")
        assert name in environment_names()
        monkeypatch.setenv(name, value)
    load_settings()


@pytest.mark.parametrize("line", starting("python", "python3", ".venv/bin/python"))
def test_a_python_command_runs_what_is_there(line: str) -> None:
    _, *arguments = without_environment(line)
    if arguments[0] != "-m":
        assert (REPOSITORY / arguments[0]).is_file()
    elif arguments[1] == "pip":
        extra = re.fullmatch(r"\.\[(\w+)\]", arguments[arguments.index("-e") + 1])
        assert extra is not None
        assert extra[1] in PROJECT["project"]["optional-dependencies"]
    else:
        assert arguments[1] == model.serving.http.__name__, "say here how another module is checked"
        parse(get_command(service), arguments[2:])


@pytest.mark.parametrize("line", starting("modal"))
def test_a_modal_command_names_what_the_app_defines(line: str) -> None:
    _, verb, *arguments = shlex.split(line)
    assert verb in ("run", "deploy")
    module = arguments[0] == "-m"
    place, _, name = arguments.pop(1 if module else 0).partition("::")
    assert place == (modal_app.__name__ if module else "deploy/modal_app.py")
    assert hasattr(modal_app, name)
    body = ast.parse((REPOSITORY / "deploy/modal_app.py").read_text("utf-8")).body
    functions = {node.name: node.args.args for node in body if isinstance(node, ast.FunctionDef)}
    options = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    assert options <= {argument.arg for argument in functions.get(name, [])}


def test_make_targets_exist_and_help_lists_them_all() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    assert phony is not None
    targets = set(phony[1].split())
    printed = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make (\w+)", printed, flags=re.MULTILINE)) == targets - {"help"}
    assert set(re.findall(r"(?:`|^)make (\w+)", ALL, flags=re.MULTILINE)) <= targets


def test_every_command_line_verb_is_documented() -> None:
    names = {name for name, command in verbs() if not hasattr(command, "commands")}
    assert {name for name in names if not re.search(rf"\b{name}\b", ALL)} == set()


def test_options_named_in_the_text_exist() -> None:
    known = [command for _, command in verbs()] + [get_command(service)]
    options = {
        option
        for command in known
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"`(?:story [\w ]*)?(--[a-z-]+)", ALL)) - {"--help"}
    assert named, "the pages name options"
    assert named - options == set()


def test_every_preset_is_documented() -> None:
    assert [name for name in preset_names() if f"`{name}`" not in TEXT["training.md"]] == []


def test_settings_named_in_the_text_exist() -> None:
    named = set(re.findall(r"\bSTORY_[A-Z_]*[A-Z]\b(?!_?…)", ALL))
    known = {*environment_names(), *(f"{name}_FILE" for name in secret_names())}
    assert named - known == set()
    assert all(f"`{name}_FILE`" in TEXT["configuration.md"] for name in secret_names())


def test_metrics_named_in_the_text_exist() -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (REPOSITORY / "model").rglob("*.py"))
    named = {name.removesuffix("_total") for name in re.findall(r"`(story_\w+)`", ALL)}
    assert {name for name in named if f'"{name}"' not in sources} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = TEXT[path.name]
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []
    code = re.findall(rf"(?<![\w./-])((?:{PACKAGES})/[\w.*/-]*\w/?)", "\n".join(re.findall(r"`[^`]*`", text)))
    shell = [word for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for word in block.split()]
    shell = [word.partition("::")[0] for word in shell if re.match(rf"({PACKAGES})/[\w.]", word)]
    named = [name for name in (*code, *shell) if not name.startswith(MADE)]
    assert [name for name in named if not any(REPOSITORY.glob(name))] == []


@pytest.mark.parametrize("page", [path for path in MANUAL if "<!-- table" in TEXT[path.name]], ids=str)
def test_a_table_made_from_the_code_is_current(page: Path) -> None:
    assert with_tables(TEXT[page.name]) == TEXT[page.name], "run `make docs`"


def test_every_table_has_a_page() -> None:
    assert set(re.findall(r"<!-- table: (\w+) -->", ALL)) == set(TABLES)


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.encode()) <= 9 * 1024
    first = re.findall(r"^make \w+", README, flags=re.MULTILINE)[:2]
    assert first == ["make demo", "make test"]


def test_the_version_has_an_entry_in_the_changelog() -> None:
    entries = re.findall(r"^## \[([\d.]+)\]", (REPOSITORY / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert entries[0] == PROJECT["project"]["version"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = json.dumps(tomllib.loads((REPOSITORY / "zensical.toml").read_text("utf-8"))["project"]["nav"])
    named = re.findall(r'"([\w-]+\.md)"', navigation)
    assert sorted(named) == sorted(path.name for path in (REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("wrong", ["[x](nowhere.md)", "[x](index.md#nowhere)"])
def test_the_strict_build_fails_on_a_broken_link(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n{wrong}\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\n')
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, check=False
    )
    assert built.returncode != 0
    assert "does not exist" in built.stdout + built.stderr


@pytest.fixture(scope="module")
def shipped() -> Iterator[Running]:
    """The service over the shipped model."""
    with serving(LocalBackend.load(Settings())) as running:
        yield running


@pytest.mark.parametrize("line", starting("curl"))
def test_a_curl_example_gets_an_answer(line: str, shipped: Running) -> None:
    words = shlex.split(line)
    (url,) = (word for word in words if word.startswith("http://"))
    path = url.removeprefix("http://127.0.0.1:7860")
    body = words[words.index("-d") + 1] if "-d" in words else None
    response = shipped.client.request("POST" if body else "GET", path, content=body)
    assert response.status_code == 200
    streamed = body is not None and bool(json.loads(body).get("stream"))
    assert response.headers["content-type"].startswith("text/event-stream" if streamed else "application/json")
    assert ("-N" in words) == streamed


@pytest.mark.parametrize("source", sorted(set(blocks("python"))))
def test_a_python_example_prints_a_story(source: str, shipped: Running) -> None:
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(source.replace("http://127.0.0.1:7860", shipped.url), "example", "exec"), {})
    assert len(printed.getvalue().split()) > 5
