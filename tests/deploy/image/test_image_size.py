"""The weight of an installation: each file counted once, under the package that brought it, and held to a budget."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from deploy.image import image_size
from deploy.image.image_size import Part, weigh

NOISE = random.Random(1).randbytes(50_000)
"""Bytes that no packer makes smaller."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two packages, one of which laid a script outside, and files of no package."""
    site = tmp_path / "opt/venv/lib/python3.12/site-packages"
    for path, content in {
        site / "heavy/core.so": NOISE,
        site / "heavy/__init__.py": b"",
        site / "heavy-1.2.dist-info/RECORD": b"heavy/core.so,sha256=x,50000\nheavy/__init__.py,,\n"
        b'"heavy/gone, with a comma.txt",,\n../../../bin/heavy,,\nheavy-1.2.dist-info/RECORD,,\n',
        site / "light/__init__.py": b"pass\n" * 20,
        site / "light-0.1.dist-info/RECORD": b"light/__init__.py,,\nlight-0.1.dist-info/RECORD,,\n",
        tmp_path / "opt/venv/bin/heavy": b"#!/usr/bin/env python\n",
        tmp_path / "usr/lib/x86_64-linux-gnu/deep/libc.so": b"c" * 3000,
        tmp_path / "motd": b"hello",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.link(site / "heavy/core.so", site / "heavy/same.so")
    (tmp_path / "usr/lib/link").symlink_to(site / "heavy/core.so")
    return tmp_path


def test_files_are_counted_under_their_package_and_the_rest_under_its_folder(image: Path) -> None:
    parts = {part.name: part for part in weigh(image)}
    record = image / "opt/venv/lib/python3.12/site-packages/heavy-1.2.dist-info/RECORD"
    assert parts["heavy 1.2"].bytes == 50_000 + len("#!/usr/bin/env python\n") + record.stat().st_size
    assert parts["/usr/lib/x86_64-linux-gnu"] == Part("/usr/lib/x86_64-linux-gnu", 3000, 0, 1)
    assert parts["/"].bytes == 5
    assert set(parts) == {"heavy 1.2", "light 0.1", "/usr/lib/x86_64-linux-gnu", "/"}
    sizes = [part.bytes for part in weigh(image)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_sum_is_that_of_du(image: Path) -> None:
    said = subprocess.run(
        ["find", image, "-type", "f", "-printf", "%i %s\n"], capture_output=True, text=True, check=True
    )
    once = dict(line.split() for line in said.stdout.splitlines())
    assert sum(part.bytes for part in weigh(image)) == sum(map(int, once.values()))


def test_the_packed_size_is_what_gzip_makes_of_it(image: Path) -> None:
    parts = {part.name: part for part in weigh(image, compress=True)}
    assert parts["/usr/lib/x86_64-linux-gnu"].compressed == len(zlib.compress(b"c" * 3000, 6))
    assert parts["heavy 1.2"].compressed > 50_000 > parts["light 0.1"].bytes > parts["light 0.1"].compressed


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--most", "1"], 0, ""),
        (["--most", "0.05"], 1, "0.0 MB over the budget of 0.05 MB\n"),
        (["--most-compressed", "1"], 0, ""),
        (
            ["--most", "0.01", "--most-compressed", "0.01"],
            1,
            "0.0 MB over the budget of 0.01 MB\n0.0 MB packed over the",
        ),
    ],
)
def test_a_budget_is_held(
    options: list[str], code: int, told: str, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert image_size.main([str(image), *options]) == code
    assert capsys.readouterr().err.startswith(told)


def test_the_table_sums_up_what_it_does_not_name(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image_size.main([str(image), "--rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[-1] for line in lines[:3]] == ["part", "heavy 1.2", "3 others"]
    assert lines[3].endswith(" MB")


def test_json_holds_every_part(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_size.main([str(image), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == sum(row["bytes"] for row in said["parts"])
    assert len(said["parts"]) == 4


def test_no_such_folder_is_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image_size.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none'} is not a folder\n"


def test_it_can_be_sent_into_an_image_that_does_not_hold_it(image: Path, repository: Path) -> None:
    with (repository / "deploy/image/image_size.py").open("rb") as script:
        told = subprocess.run(
            [sys.executable, "-I", "-S", "-", str(image), "--json"],
            stdin=script,
            capture_output=True,
            check=True,
        )
    assert json.loads(told.stdout)["parts"][0]["part"] == "heavy 1.2"
