"""Slimming removes only what the rules match, reports a stale rule, and leaves an app that works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.image import slim, warm

DISTRIBUTION = "write-me-a-story"


def write(path: Path, size: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_a_rule_removes_what_it_names_and_says_what_that_saved(tmp_path: Path) -> None:
    kept = write(tmp_path / "package" / "core.py")
    write(tmp_path / "package" / "tests" / "test_core.py", 30)
    write(tmp_path / "package" / "tests" / "data" / "big.csv", 70)
    write(tmp_path / "package" / "sub" / "core.pyi", 5)
    assert [slim.apply(pattern, tmp_path) for pattern in ("**/tests", "**/*.py[ix]")] == [100, 5]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_a_folder_and_what_lies_in_it_may_both_be_named(tmp_path: Path) -> None:
    write(tmp_path / "tests" / "tests" / "a.py", 7)
    assert (slim.apply("**/tests", tmp_path), list(tmp_path.iterdir())) == (7, [])


def test_a_link_is_removed_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    target = write(tmp_path / "outside" / "library.so")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "library.so").symlink_to(target)
    (tmp_path / "site" / "folder.so").symlink_to(target.parent)
    assert slim.apply("*.so", tmp_path / "site") == 0
    assert (list((tmp_path / "site").iterdir()), target.is_file()) == ([], True)


def test_a_rule_that_finds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        slim.SlimError, match=r"hf_xet matches nothing in .*: drop it from RULES or correct it"
    ):
        slim.apply("hf_xet", tmp_path)


def test_the_wrong_folder_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slim.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path} is not a site-packages folder with the app's packages"
    ]


def serving_distributions() -> set[str]:
    """What an installation of the app alone brings in, by the metadata of what is installed here."""
    wanted, found = [DISTRIBUTION], set()
    while wanted:
        name = wanted.pop()
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                other = re.sub(r"[-_.]+", "-", requirement.name).lower()
                if other not in found:
                    found.add(other)
                    wanted.append(other)
    return found


def link_installed(names: set[str], site: Path) -> None:
    """Lay the files of installed packages into `site`, as hard links where that can be, without their bytecode."""
    here = Path(sysconfig.get_path("purelib"))
    for name in names:
        for file in metadata.files(name) or []:
            source, target = Path(str(file.locate())), site / file
            if ".." in file.parts or file.suffix == ".pyc" or not source.is_relative_to(here):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)


@pytest.mark.slow
def test_the_app_shows_its_page_and_tells_stories_with_what_is_left(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site, bytecode = tmp_path / "site-packages", tmp_path / "bytecode"
    link_installed(serving_distributions(), site)
    before = slim.size_of(site)
    assert slim.main([str(site)]) == 0, capsys.readouterr().err
    assert slim.size_of(site) < 0.7 * before

    # Nothing but the slimmed packages and this checkout: -S leaves the environment's own out.
    monkeypatch.setenv("PYTHONPATH", f"{repository}{os.pathsep}{site}")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(bytecode))
    monkeypatch.setenv("STAGE", "PROD")
    command = [sys.executable, "-S", str(repository / "story.py"), "demo", "--host", "127.0.0.1"]
    look = "import importlib.util as u; print(*(bool(u.find_spec(n)) for n in ('torch', 'mlflow', 'hf_xet', 'gradio')))"
    tried = subprocess.run([sys.executable, "-S", "-c", look], capture_output=True, text=True, check=True)
    assert tried.stdout.split() == ["False", "False", "False", "True"]
    assert warm.main(command) == 0, capsys.readouterr()
    assert "a story of 40 tokens" in capsys.readouterr().out
    assert len(list(bytecode.rglob("*.pyc"))) > 500
