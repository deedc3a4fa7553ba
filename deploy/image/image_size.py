"""Print what an installation or a whole image weighs, package by package, so that growth is noticed.

It reads the file lists that pip keeps, adds up the files that exist, and counts all others under their folder. With
`--most` it is a check: exit code 1 says by how much the budget is exceeded. It needs nothing but Python, so it can
also be piped into an image that does not contain it:

    python deploy/image/image_size.py .venv
    docker run --rm -i write-me-a-story python - / --most 420 < deploy/image/image_size.py

`--compressed` also packs each part as a registry would (gzip), which takes about half a minute; the sum is within
some per cent of the image's layers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 1e6
BUDGET_MB, COMPRESSED_BUDGET_MB = 420, 150
"""What the app's image may weigh."""
DEPTH = 3
"""Folders of a path that name a part which belongs to no package: `/usr/lib/x86_64-linux-gnu`."""


@dataclass(slots=True)
class Part:
    """A package, or a folder of files that belong to none. Sizes in bytes."""

    name: str
    bytes: int = 0
    compressed: int = 0
    files: int = 0


def files_below(root: Path) -> Iterator[Path]:
    """Yield all files on the disk of `root` itself, hard links once; mounts below it (/proc) stay out."""
    device = root.lstat().st_dev
    seen: set[int] = set()
    for folder, names, files in os.walk(root):
        here = Path(folder)
        names[:] = sorted(name for name in names if (here / name).lstat().st_dev == device)
        for name in sorted(files):
            path = here / name
            entry = path.lstat()
            if path.is_file() and not path.is_symlink() and entry.st_ino not in seen:
                seen.add(entry.st_ino)
                yield path


def owners(root: Path) -> dict[Path, str]:
    """Return which package installed each file, from the `RECORD`s below `root`."""
    owned: dict[Path, str] = {}
    for record in sorted(root.rglob("*.dist-info/RECORD")):
        name = record.parent.name.removesuffix(".dist-info").replace("-", " ", 1)
        for line in record.read_text("utf-8", errors="replace").splitlines():
            path = line.rsplit(",", 2)[0].strip('"')
            owned[Path(os.path.normpath(record.parents[1] / path))] = name
    return owned


def weigh(root: Path, *, compress: bool = False) -> list[Part]:
    """Return the parts below `root`, heaviest first. A file of no package counts for its path's first folders."""
    owned = owners(root)
    parts: dict[str, Part] = defaultdict(lambda: Part(""))
    packers: dict[str, Any] = {}
    for path in files_below(root):
        name = owned.get(path) or "/" + "/".join(path.relative_to(root).parts[:-1][:DEPTH])
        part = parts[name]
        part.name = name
        part.files += 1
        part.bytes += path.lstat().st_size
        if compress:
            packer = packers.setdefault(name, zlib.compressobj(6))
            part.compressed += len(packer.compress(path.read_bytes()))
    for name, packer in packers.items():
        parts[name].compressed += len(packer.flush())
    return sorted(parts.values(), key=lambda part: (-part.bytes, part.name))


def print_table(parts: list[Part], rows: int, *, packed: bool) -> None:
    """Print the heaviest parts, and one row for the rest."""
    shown, rest = parts[:rows], parts[rows:]
    if rest:
        totals = (sum(p.bytes for p in rest), sum(p.compressed for p in rest), sum(p.files for p in rest))
        shown = [*shown, Part(f"{len(rest)} others", *totals)]
    print(f"{'MB':>8}  {'packed':>8}  files  part" if packed else f"{'MB':>8}  files  part")
    for part in shown:
        middle = f"{part.compressed / MB:8.1f}  " if packed else ""
        print(f"{part.bytes / MB:8.1f}  {middle}{part.files:5}  {part.name}")


def main(arguments: list[str] | None = None) -> int:
    """Weigh one folder. Exit code 1: it exceeds a budget; 2: there is no such folder."""
    parser = argparse.ArgumentParser(description="Print what an installation or an image weighs.")
    parser.add_argument("root", type=Path, help="a virtual environment, an unpacked image, or / inside one")
    parser.add_argument("--most", type=float, metavar="MB", help=f"budget; the image's is {BUDGET_MB}")
    parser.add_argument("--compressed", action="store_true", help="also pack each part with gzip")
    parser.add_argument(
        "--most-compressed", type=float, metavar="MB", help=f"as --most; the image's is {COMPRESSED_BUDGET_MB}"
    )
    parser.add_argument("--rows", type=int, default=25, help="parts shown by name (25)")
    parser.add_argument("--json", action="store_true", help="print JSON for a machine instead of a table")
    chosen = parser.parse_args(arguments)
    if not chosen.root.is_dir():
        print(f"{chosen.root} is not a folder", file=sys.stderr)
        return 2
    compress = chosen.compressed or chosen.most_compressed is not None
    parts = weigh(chosen.root.resolve(), compress=compress)
    total, packed = sum(part.bytes for part in parts), sum(part.compressed for part in parts)
    if chosen.json:
        rows = [{"part": p.name, "bytes": p.bytes, "compressed": p.compressed, "files": p.files} for p in parts]
        print(json.dumps({"bytes": total, "compressed": packed, "parts": rows}))
    else:
        print_table(parts, chosen.rows, packed=compress)
        print(f"{total / MB:8.1f} MB" + (f", {packed / MB:.1f} MB packed" if compress else ""))
    over = False
    for what, budget, found in (("", chosen.most, total), (" packed", chosen.most_compressed, packed)):
        if budget is not None and found > budget * MB:
            print(f"{(found / MB - budget):.1f} MB{what} over the budget of {budget:g} MB", file=sys.stderr)
            over = True
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
