from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import training.tracking.provenance
from training.tracking.provenance import git_state, machine_facts, provenance, usable_cores


def git(folder: Path, *arguments: str) -> str:
    settings = ("user.name=A Test", "user.email=test@example.invalid", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *(word for one in settings for word in ("-c", one)), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that tracks the module, as a clone of the project does."""
    root = tmp_path / "clone"
    (root / "training" / "tracking").mkdir(parents=True)
    shutil.copy(training.tracking.provenance.__file__, root / "training" / "tracking" / "provenance.py")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def test_a_clean_checkout_reports_its_revision(checkout: Path) -> None:
    assert git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


def test_a_changed_file_makes_it_dirty(checkout: Path) -> None:
    with (checkout / "training" / "tracking" / "provenance.py").open("a") as file:
        file.write("\n")
    assert git_state(checkout)[1] is True


def test_a_file_that_git_does_not_know_makes_it_dirty(checkout: Path) -> None:
    (checkout / "training" / "new.py").write_text("x = 1\n")
    assert git_state(checkout)[1] is True


def test_a_copy_inside_another_repository_does_not_pass_for_its_revision(checkout: Path) -> None:
    inner = checkout / "site-packages"
    (inner / "training" / "tracking").mkdir(parents=True)
    shutil.copy(training.tracking.provenance.__file__, inner / "training" / "tracking" / "provenance.py")
    assert git_state(inner) == (None, None)


def test_without_a_repository_nothing_is_claimed(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)
    assert git_state(tmp_path / "absent") == (None, None)


def test_without_git_the_other_facts_are_still_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = provenance()
    assert (facts.git_sha, facts.git_dirty) == (None, None)
    assert facts.packages["numpy"] == version("numpy")
    assert not any(name.startswith("git.") for name in facts.tags())


def test_a_git_hook_of_another_repository_does_not_mislead_it(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert git_state(checkout)[0] is not None


def test_the_machine_is_described_without_naming_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine_facts()
    assert int(facts["cores"]) >= 1
    assert float(facts["memory_gb"]) > 0
    shown = " ".join(provenance().tags().values())
    assert str(Path.home()) not in shown
    assert str(Path.cwd()) not in shown


def test_only_cores_that_this_process_may_use_count() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)


def test_tags_say_the_same_as_the_dictionary() -> None:
    facts = provenance()
    nested, tags = facts.as_dict(), facts.tags()
    assert tags.get("git.sha") == nested["git"]["sha"]
    assert {key: value for key, value in tags.items() if key.startswith("package.")} == {
        f"package.{name}": value for name, value in nested["packages"].items()
    }
