"""Workflow files as GitHub reads them, and their steps run by bash on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = REPOSITORY / ".github" / "workflows"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """YAML 1.2's booleans: `on` is a word."""


_Loader.yaml_implicit_resolvers = {
    letter: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool"]
    for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))


def read(path: Path) -> dict[str, Any]:
    """A YAML file of GitHub's."""
    return dict(yaml.load(path.read_text("utf-8"), Loader=_Loader))


def run_steps(workflow: dict[str, Any], job: str) -> list[dict[str, Any]]:
    """The `run:` steps of a job, in order."""
    return [step for step in workflow["jobs"][job]["steps"] if "run" in step]


@dataclass
class Runner:
    """A checkout of the working tree and a runner's files, in an empty folder."""

    place: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkout.mkdir()
        listed = self._git("ls-files", "-z", "--cached", "--others", "--exclude-standard", at=REPOSITORY)
        names = [name for name in listed.split("\0") if name and (REPOSITORY / name).is_file()]
        names += [str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "model").rglob("_native*.so")]
        for name in names:
            target = self.checkout / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPOSITORY / name).read_bytes())
            target.chmod((REPOSITORY / name).stat().st_mode)
        self._git("init", "--quiet")
        self.commit("as it is")
        tools = self.place / "bin"
        installed = self.checkout / ".venv" / "bin"
        for tool, arguments in ((installed / "story", f'"{self.checkout}/story.py"'), (tools / "python3", "")):
            tool.parent.mkdir(parents=True)
            tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
            tool.chmod(0o755)
        self.summary.touch()
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        self.environment = {
            **kept,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.checkout),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GITHUB_ACTIONS": "true",
            "GITHUB_REPOSITORY": "someone/write-me-a-story",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.place / "output"),
            **self.environment,
        }

    @property
    def checkout(self) -> Path:
        return self.place / "checkout"

    @property
    def summary(self) -> Path:
        return self.place / "summary.md"

    def commit(self, message: str) -> None:
        """Commit all of the checkout."""
        self._git("add", "--all")
        self._git("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", message)

    def head(self) -> str:
        """The commit that is checked out."""
        return self._git("rev-parse", "HEAD").strip()

    def run(self, step: Mapping[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a step as a runner does: `bash --noprofile --norc -eo pipefail` on its text."""
        script = self.place / "step.sh"
        script.write_text(step["run"])
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.checkout,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=580,
        )

    def _git(self, *arguments: str, at: Path | None = None) -> str:
        done = subprocess.run(
            ["git", "-c", "safe.directory=*", *arguments],
            cwd=at or self.checkout,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout
