"""Dockerfiles, read as far as the tests need it."""

from __future__ import annotations

import re
from pathlib import Path


def instructions(path: Path) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, comments dropped and continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in whole.splitlines():
        if line.strip():
            name, _, arguments = line.strip().partition(" ")
            found.append((name.upper(), arguments.strip()))
    return found


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """The same, by stage."""
    made: list[list[tuple[str, str]]] = []
    for instruction in instructions(path):
        if instruction[0] == "FROM":
            made.append([])
        made[-1].append(instruction)
    return made
