"""Slimming: only what the rules name goes, a rule that guards nothing is told, and the app works with what is left."""

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
    rules = (slim.Rule(("*/tests",), "tests"), slim.Rule(("**/*.pyi",), "types"))
    saved = list(slim.apply(rules, tmp_path))
    assert [(step.what, step.bytes) for step in saved] == [("*/tests: tests", 100), ("**/*.pyi: types", 5)]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_a_folder_and_what_lies_in_it_may_both_be_named(tmp_path: Path) -> None:
    write(tmp_path / "tests" / "tests" / "a.py", 7)
    (saved,) = slim.apply((slim.Rule(("**/tests",), "tests"),), tmp_path)
    assert (saved.bytes, list(tmp_path.iterdir())) == (7, [])


def test_a_link_is_removed_and_what_it_leads_to_is_not(tmp_path: Path) -> None:
    target = write(tmp_path / "outside" / "library.so")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "library.so").symlink_to(target)
    (tmp_path / "site" / "folder.so").symlink_to(target.parent)
    (saved,) = slim.apply((slim.Rule(("*.so",), "libraries"),), tmp_path / "site")
    assert (saved.bytes, list((tmp_path / "site").iterdir()), target.is_file()) == (0, [], True)


def test_a_rule_that_finds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        slim.SlimError, match=r"hf_xet matches nothing in .*: drop it from RULES or correct it"
    ):
        list(slim.apply((slim.Rule(("hf_xet",), "uploads"),), tmp_path))


def test_an_edit_must_fit_exactly_once_and_leaves_other_links_alone(tmp_path: Path) -> None:
    original = write(tmp_path / "original")
    original.write_text("before\nafter\n", "utf-8")
    os.link(original, tmp_path / "copy.py")
    slim.edit((slim.Edit("copy.py", "before\n", "pass\n", "time"),), tmp_path)
    assert (tmp_path / "copy.py").read_text("utf-8") == "pass\nafter\n"
    assert original.read_text("utf-8") == "before\nafter\n"
    with pytest.raises(slim.SlimError, match=r"copy\.py holds 'before' 0 times, not once: correct EDITS"):
        slim.edit((slim.Edit("copy.py", "before\n", "pass\n", "time"),), tmp_path)


def page_of(folder: Path, **parts: str) -> Path:
    """A page whose parts hold these texts; `_` stands for the dot before the suffix."""
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text('<script type="module" src="./assets/index-1.js"></script>', "utf-8")
    for name, text in parts.items():
        (folder / "assets" / name.replace("__", "-").replace("_", ".")).write_text(text, "utf-8")
    return folder


def test_a_part_of_the_page_goes_with_what_only_it_leads_to(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        index__1_js='import"./shared-1.js";const a=()=>import(`./Model-1.js`),b=()=>import("./Text-1.js")',
        Model__1_js='import{b}from"./canvas-1.js"',
        canvas__1_js='import"./engine-1.js";import"./shared-1.js";const d=["./assets/canvas-1.css"]',
        canvas__1_css="@font-face{src:url(./lines-1.woff2)}",
        engine__1_js='import"./canvas-1.js"',
        lines__1_woff2="font",
        shared__1_js="1",
        Text__1_js="2",
        unknown__1_js="nobody leads here",
    )
    (saved,) = slim.fell((slim.Trunk("canvas-*.js", "models"),), page)
    left = {path.name for path in (page / "assets").iterdir()}
    assert left == {"index-1.js", "Model-1.js", "shared-1.js", "Text-1.js", "unknown-1.js"}
    assert saved.bytes > 0
    with pytest.raises(slim.SlimError, match=r"canvas-\*\.js matches nothing in .*: drop it from TRUNKS"):
        list(slim.fell((slim.Trunk("canvas-*.js", "models"),), page))


def test_the_installed_pages_parts_are_all_found_from_its_first_one(tmp_path: Path) -> None:
    """Else what is still needed might count as led to by nothing."""
    installed = Path(sysconfig.get_path("purelib")) / "gradio/templates/frontend"
    (tmp_path / "assets").mkdir()
    shutil.copy(installed / "index.html", tmp_path)
    for path in (installed / "assets").iterdir():
        if path.is_file():
            (tmp_path / "assets" / path.name).symlink_to(path)
    sizes = [saved.bytes for saved in slim.fell(slim.TRUNKS, tmp_path)]
    assert sizes == [0] * len(slim.TRUNKS), "links weigh nothing"
    gone = {path.name for path in (installed / "assets").iterdir()} - {
        path.name for path in (tmp_path / "assets").iterdir()
    }
    assert 100 < len(gone) < 0.7 * len(list((installed / "assets").iterdir()))
    needed = ("index-", "Blocks-", "Index-", "HTML-", "embed-", "markdown-code-")
    assert not any(name.startswith(needed) for name in gone)


def test_the_drivers_openssl_gives_way_to_the_systems_of_that_version_only(tmp_path: Path) -> None:
    libraries = tmp_path / "site" / "psycopg_binary.libs"
    for name in ("libcrypto-3a.so.3", "libssl-6b.so.3", "libpq-1.so.5"):
        write(libraries / name, 40)
    write(tmp_path / "lib" / "libcrypto.so.3", 7)
    write(tmp_path / "lib" / "libssl.so.1", 7)
    with pytest.raises(slim.SlimError, match=r"libssl\.so\.3 is missing"):
        slim.share_openssl(tmp_path / "site", tmp_path / "lib")
    for copy in libraries.iterdir():
        copy.unlink()
        write(copy, 40)
    write(tmp_path / "lib" / "libssl.so.3", 7)
    assert slim.share_openssl(tmp_path / "site", tmp_path / "lib").bytes == 80
    assert (libraries / "libcrypto-3a.so.3").read_bytes() == b"x" * 7
    assert (libraries / "libpq-1.so.5").stat().st_size == 40
    (libraries / "libssl-6b.so.3").unlink()
    with pytest.raises(slim.SlimError, match=r"holds 0 of libssl, not one"):
        slim.share_openssl(tmp_path / "site", tmp_path / "lib")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with symbols, made here."""
    if shutil.which("gcc") is None or shutil.which("strip") is None:
        pytest.skip("gcc and strip are not on the PATH (Debian: gcc, binutils)")
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.c").write_text(
        "static int hidden(int x){return x+1;} int shown(int x){return hidden(x);}", "utf-8"
    )
    made = folder / "a.so"
    subprocess.run(["gcc", "-g", "-O0", "-shared", "-fPIC", "-o", made, folder / "a.c"], check=True)
    return made


def test_stripping_makes_libraries_smaller_and_they_can_still_be_loaded(
    library: Path, tmp_path: Path
) -> None:
    os.link(library, tmp_path / "a.so")
    before = library.read_bytes()
    saved = slim.strip(tmp_path)
    assert saved.bytes == len(before) - (tmp_path / "a.so").stat().st_size > 0
    program = f"import ctypes; assert ctypes.CDLL({str(tmp_path / 'a.so')!r}).shown(41) == 42"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert library.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.so"]


def test_what_is_no_library_stays_as_it_is(tmp_path: Path) -> None:
    odd = write(tmp_path / "odd.so")
    assert slim.strip(tmp_path).bytes == 0
    assert odd.read_bytes() == b"x" * 100
    assert not slim.can_be_loaded(odd)


def test_a_library_whose_segments_were_moved_is_not_taken(library: Path, tmp_path: Path) -> None:
    assert slim.can_be_loaded(library)
    content = bytearray(library.read_bytes())
    table = int.from_bytes(content[32:40], "little")
    assert content[table : table + 4] == b"\x01\0\0\0"  # the first segment, which is loaded
    content[table + 8] += 8  # its place in the file
    (tmp_path / "moved.so").write_bytes(content)
    assert not slim.can_be_loaded(tmp_path / "moved.so")


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
    assert slim.main([str(site), *([] if shutil.which("strip") else ["--no-strip"])]) == 0, (
        capsys.readouterr().err
    )
    assert slim.size_of(site) < 0.65 * before

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
