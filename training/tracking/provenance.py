"""Record code revision, package versions and machine of a run or report.

Unknown facts are left out; nothing here raises, or names a person, a folder or an address.
"""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("write-me-a-story", "torch", "numpy", "tokenizers", "safetensors", "onnxruntime", "mlflow")
"""Those that can move a figure."""

GIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What made a figure. `None` and absent keys mean: could not be found out."""

    git_sha: str | None
    git_dirty: bool | None
    """Whether files differed from that revision, files that git does not know included."""
    packages: dict[str, str]
    machine: dict[str, str | int | float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "git": {"sha": self.git_sha, "dirty": self.git_dirty},
            "packages": self.packages,
            "machine": self.machine,
        }

    def tags(self, source: str | None = None) -> dict[str, str]:
        """The same as flat text: `git.sha`, `git.dirty`, `package.torch`, `machine.cpu`, …

        With `source`, a command such as `story train`, also the tags by which MLflow shows a run's source.
        """
        tags = {f"package.{name}": version for name, version in self.packages.items()}
        tags |= {f"machine.{name}": str(value) for name, value in self.machine.items()}
        if self.git_sha is not None:
            tags["git.sha"] = self.git_sha
        if self.git_dirty is not None:
            tags["git.dirty"] = str(self.git_dirty).lower()
        if source is not None:
            tags |= {"mlflow.source.name": source, "mlflow.source.type": "LOCAL"}
            tags |= {} if self.git_sha is None else {"mlflow.source.git.commit": self.git_sha}
        return tags


def provenance() -> Provenance:
    """Find out what can be found out, in some tens of milliseconds."""
    sha, dirty = git_state(ROOT)
    return Provenance(git_sha=sha, git_dirty=dirty, packages=package_versions(), machine=machine_facts())


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Revision checked out in `root`, and whether files differ from it; `(None, None)` where git cannot say.

    This file must be tracked there: a copy of the project inside another repository is not that revision.
    """
    sha = _git(root, "rev-parse", "--verify", "HEAD")
    if sha is None or _git(root, "ls-files", "--error-unmatch", "training/tracking/provenance.py") is None:
        return None, None
    changes = _git(root, "status", "--porcelain")
    return sha, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or `None` when there is no git, no repository or no answer in time."""
    # Inside a git hook these point at another repository; and a look must not take the index's lock.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Versions of the installed ones of `PACKAGES`, from their metadata: nothing is imported."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def usable_cores() -> int:
    """Number of cores that this process may run on: its CPU affinity, or all where the system has none."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def machine_facts() -> dict[str, str | int | float]:
    """The kind of machine: `system`, `architecture`, `python`, `cores`, `cpu`, `memory_gb`, `accelerators`.

    `cores` are those this process may use, `memory_gb` is in 10⁹ bytes.
    """
    facts: dict[str, str | int | float] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cores": usable_cores(),
    }
    if cpu := _cpu_name():
        facts["cpu"] = cpu
    with suppress(AttributeError, OSError, ValueError):
        facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if accelerators := _accelerators():
        facts["accelerators"] = accelerators
    return facts


def _cpu_name() -> str:
    """`model name` of Linux's table; the C library's word elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def _accelerators() -> str:
    """Names of the GPUs torch sees; asked only of a torch that is loaded, because loading takes seconds."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    try:
        count = torch.cuda.device_count()
        return ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    except (AttributeError, AssertionError, RuntimeError):
        return ""
