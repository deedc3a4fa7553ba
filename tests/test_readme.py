"""The documents cannot rot: the README's table, commands, targets and links are held to the real ones."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import story
from model.settings_table import environment_table

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")


def _lines_of_shell() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [
        line.partition(" #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()
    ]


STORY_LINES = [line for line in _lines_of_shell() if line.startswith("story ")]


def test_the_two_commands_come_first() -> None:
    assert [line.split()[:2] for line in _lines_of_shell()[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("line", STORY_LINES)
def test_a_documented_command_is_understood(line: str) -> None:
    command: Any = get_command(story.app)
    _, verb, *arguments = shlex.split(line)
    command = command.commands[verb]
    if hasattr(command, "commands"):
        verb, *arguments = arguments
        command = command.commands[verb]
    context = command.make_context(
        verb, arguments
    )  # parses and converts, runs nothing; a usage error is raised
    assert context.command.name == verb


def test_every_verb_is_documented() -> None:
    verbs = set(get_command(story.app).commands)  # type: ignore[attr-defined]
    told = {name for name in verbs if re.search(rf"\bstory {name}\b", README)}
    assert told == verbs


def test_options_named_in_the_text_exist() -> None:
    group: Any = get_command(story.app)
    verbs = [group, *group.commands.values()]
    verbs += [below for verb in verbs[1:] for below in getattr(verb, "commands", {}).values()]
    options = {
        option
        for command in verbs
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"}
    assert named, "the README tells of options"
    assert named <= options


def test_the_table_of_settings_is_the_real_one() -> None:
    table = re.search(r"<!-- settings:.*?-->\n(.*?)<!-- /settings -->", README, flags=re.DOTALL)
    assert table is not None
    assert table[1] == environment_table()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(document: str, repository: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (repository / document).read_text("utf-8"))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (repository / link).exists()] == []


def test_make_targets_exist_and_help_lists_them_all(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    targets = set(phony[1].split())
    printed = subprocess.run(
        ["make", "help"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^make (\w+)", printed, flags=re.MULTILINE)) == targets - {"help"}
    documents = README + (repository / "CONTRIBUTING.md").read_text("utf-8")
    assert set(re.findall(r"(?:`|^)make (\w+)", documents, flags=re.MULTILINE)) <= targets
