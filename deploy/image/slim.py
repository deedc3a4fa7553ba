"""Removes from an installation what serving never reads, and tells what each removal saved.

A plain installation of the app takes about 370 MB, and half of it is never opened: Gradio's server-side renderer
and sample media, a second copy of ONNX Runtime for programs in C, test suites, headers, debug symbols. `RULES` says
what goes and why. A rule that finds nothing ends the run, for then a package has changed and the rule guards nothing
any more. `TRUNKS` are parts of Gradio's page that go with all that only they lead to, and `EDITS` takes out one piece
of work that Gradio does at each start. `deploy/image/warm.py` tries what is left by writing a story with it.

    python deploy/image/slim.py /opt/story/venv/lib/python3.12/site-packages
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MB = 1e6
ELF_64 = b"\x7fELF\x02\x01"
"""How a library for a 64-bit little-endian machine begins."""
LOAD, PAGE = 1, 4096


@dataclass(frozen=True, slots=True)
class Rule:
    """What to remove."""

    globs: tuple[str, ...]
    """Below site-packages; a folder goes with all that it holds."""
    reason: str
    """Why serving does without it."""


RULES = (
    Rule(("hf_xet", "hf_xet-*.dist-info"), "uploads to and fast downloads from the Hugging Face hub"),
    Rule(("onnxruntime/capi/libonnxruntime.so*",), "for programs in C; Python's module holds its own copy"),
    Rule(
        ("onnxruntime/transformers", "onnxruntime/quantization", "onnxruntime/tools", "onnxruntime/datasets"),
        "makes and converts graphs; ours are made",
    ),
    Rule(("gradio/templates/node",), "renders pages in Node.js, which is off and not installed"),
    Rule(("gradio/templates/frontend/static/ffmpeg",), "cuts videos in the browser; the page shows none"),
    Rule(("gradio/templates/frontend/static/bokeh",), "draws Bokeh's plots, which need Bokeh installed"),
    Rule(
        ("gradio/templates/frontend/assets/PlotlyPlot-*", "gradio/templates/frontend/assets/AltairPlot-*"),
        "draws the plots of two packages that are not installed",
    ),
    Rule(
        ("gradio/templates/frontend/static/fonts",), "fonts of Gradio's own themes; the page's theme has none"
    ),
    Rule(("gradio/media_assets",), "sample pictures, sounds and films for Gradio's own demos"),
    Rule(("*/tests", "numpy/**/tests"), "test suites"),
    Rule(("numpy/f2py", "numpy/_core/_simd.*.so"), "wraps Fortran, and tests of numpy's vector code"),
    Rule(("PIL/_avif.*.so", "pillow.libs/libavif-*"), "pictures in AVIF; the page takes no pictures"),
    Rule(("PIL/_imagingtk.*.so", "PIL/_tkinter_finder.py"), "pictures in Tk's windows"),
    Rule(("PIL/_webp.*.so", "pillow.libs/libwebp*", "pillow.libs/libsharpyuv-*"), "pictures in WebP"),
    Rule(("PIL/_imagingcms.*.so", "pillow.libs/liblcms2-*"), "colour profiles of pictures"),
    Rule(
        ("PIL/_imagingft.*.so", "pillow.libs/libfreetype-*", "pillow.libs/libharfbuzz-*"),
        "draws letters in pictures",
    ),
    Rule(("pytz/zoneinfo",), "time zones for pandas before 3; Python's own are there"),
    Rule(
        ("google/protobuf", "google/_upb"), "reads and writes graphs in Python; ONNX Runtime does so in C++"
    ),
    Rule(("huggingface_hub/cli",), "commands for the Hugging Face hub"),
    Rule(("sqlalchemy/testing", "alembic/testing"), "test suites of their dialects"),
    Rule(
        tuple(f"sqlalchemy/dialects/{kind}" for kind in ("mysql", "mssql", "oracle")),
        "databases that are not spoken to",
    ),
    Rule(("pygments/lexers/[a-z]*.py",), "colours code in 500 languages; nothing here shows code"),
    Rule(("**/*.pyi", "**/*.pxd", "**/*.pyx"), "types for editors and Cython"),
    Rule(("**/*.h", "**/*.a"), "what compilers read"),
)


@dataclass(frozen=True, slots=True)
class Trunk:
    """A part of Gradio's page to remove, with all that only it leads to."""

    glob: str
    """In the folder of the page's parts."""
    reason: str


TRUNKS = (
    Trunk("Canvas3D*.js", "models in three dimensions"),
    Trunk("mermaid.core-*.js", "diagrams in Markdown"),
    Trunk("hls-*.js", "films that come in pieces"),
)

OPENSSL = ("libcrypto", "libssl")
"""What PostgreSQL's driver brings along and Python has already: see `share_openssl`."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A line of a package to replace."""

    file: str
    before: str
    """Found exactly once, or the run ends."""
    after: str
    reason: str


EDITS = (
    Edit(
        "gradio/component_meta.py",
        "        create_or_modify_pyi(component_class, name, events)\n",
        "        pass\n",
        "parses each component's source at each start, to write types for editors: a third of the 3.4 CPU seconds "
        "that its import takes",
    ),
)


@dataclass(frozen=True, slots=True)
class Saved:
    """What one step freed, in bytes."""

    what: str
    bytes: int


class SlimError(Exception):
    """In one line: what does not fit."""


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(size_of(below) for below in path.iterdir())


def apply(rules: tuple[Rule, ...], site: Path) -> Iterator[Saved]:
    """Remove what `rules` name below `site`.

    Raises:
        SlimError: a rule's pattern matches nothing.
    """
    for rule in rules:
        freed = 0
        for glob in rule.globs:
            found = sorted(site.glob(glob))
            if not found:
                raise SlimError(f"{glob} matches nothing in {site}: drop it from RULES or correct it")
            for path in found:
                if not path.exists() and not path.is_symlink():
                    continue  # it lay in a folder that another match took along
                freed += size_of(path)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        yield Saved(f"{', '.join(rule.globs)}: {rule.reason}", freed)


def edit(edits: tuple[Edit, ...], site: Path) -> None:
    """Replace the lines that `edits` name; hard links to the file elsewhere keep theirs.

    Raises:
        SlimError: a line is not in its file exactly once.
    """
    for change in edits:
        path = site / change.file
        source = path.read_text("utf-8") if path.is_file() else ""
        if (count := source.count(change.before)) != 1:
            raise SlimError(
                f"{change.file} holds {change.before.strip()!r} {count} times, not once: correct EDITS"
            )
        path.unlink()
        path.write_text(source.replace(change.before, change.after), "utf-8")


REFERENCE = re.compile(rb"""["'`(](?:[\w./-]*/)?([\w.-]+\.(?:js|css|woff2?|ttf|svg|wasm))["'`)]""")
"""How a part of the page names another one: an import, a style sheet, a font."""


def fell(trunks: tuple[Trunk, ...], frontend: Path) -> Iterator[Saved]:
    """Remove parts of the page below `frontend`, each with those that nothing else leads to.

    A part is loaded when a component first needs it, so a page without that component never misses it.

    Raises:
        SlimError: a trunk's pattern matches nothing.
    """
    parts = {path.name: path for path in (frontend / "assets").iterdir() if path.is_file()}
    leads_to = {
        name: {found.decode() for found in REFERENCE.findall(path.read_bytes())} & parts.keys()
        for name, path in parts.items()
        if path.suffix in (".js", ".css")
    }
    start = {found.decode() for found in REFERENCE.findall((frontend / "index.html").read_bytes())}

    def reached(without: set[str]) -> set[str]:
        seen: set[str] = set()
        ahead = list(start & parts.keys())
        while ahead:
            name = ahead.pop()
            if name not in seen and name not in without:
                seen.add(name)
                ahead += leads_to.get(name, ())
        return seen

    felled: set[str] = set()
    before = reached(felled)
    for trunk in trunks:
        found = {path.name for path in (frontend / "assets").glob(trunk.glob)}
        if not found:
            raise SlimError(
                f"{trunk.glob} matches nothing in {frontend}/assets: drop it from TRUNKS or correct it"
            )
        felled |= found
        after = reached(felled)
        gone = (before - after) | found
        freed = sum(size_of(parts[name]) for name in gone)
        for name in gone:
            parts[name].unlink()
        before = after
        yield Saved(f"{trunk.glob} and what only it leads to: {trunk.reason}", freed)


def share_openssl(site: Path, system: Path) -> Saved:
    """Let PostgreSQL's driver load the system's OpenSSL, which Python's own `ssl` does, in place of its copy.

    There is then one, and whoever updates the system has updated it.

    Raises:
        SlimError: the driver brings no such library any more, or the system has none of this version.
    """
    freed = 0
    for name in OPENSSL:
        copies = sorted((site / "psycopg_binary.libs").glob(f"{name}-*.so.*"))
        if len(copies) != 1:
            raise SlimError(f"psycopg_binary.libs holds {len(copies)} of {name}, not one: correct OPENSSL")
        (copy,) = copies
        shared = system / f"{name}.so.{copy.name.partition('.so.')[2]}"
        if not shared.is_file():
            raise SlimError(f"{shared} is missing, which {copy.name} would give way to")
        freed += size_of(copy)
        copy.unlink()
        copy.symlink_to(shared)
    return Saved("OpenSSL of PostgreSQL's driver: the system has one", freed)


def can_be_loaded(library: Path) -> bool:
    """Whether all segments of a library lie on page borders.

    `strip` moves segments of a library that patchelf has changed, as those in `numpy.libs`, to where the loader
    refuses them.
    """
    content = library.read_bytes()
    if not content.startswith(ELF_64):
        return False
    (table,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    for at in range(table, table + size * count, size):
        kind, _flags, offset, address = struct.unpack_from("<IIQQ", content, at)
        if kind == LOAD and (offset - address) % PAGE:
            return False
    return True


def strip(site: Path, tool: str = "strip") -> Saved:
    """Take symbols that only a debugger reads out of each library.

    A library is written anew beside the old one and takes its place, so hard links elsewhere keep theirs. One that
    the tool cannot take apart, or not put together again, stays as it is.
    """
    freed = 0
    for path in sorted(site.rglob("*.so*")):
        if path.is_symlink() or not path.is_file():
            continue
        smaller = path.with_name(path.name + ".stripped")
        done = subprocess.run(
            [tool, "--strip-unneeded", "-o", smaller, path], check=False, capture_output=True
        )
        gain = size_of(path) - size_of(smaller) if done.returncode == 0 else 0
        if gain > 0 and can_be_loaded(smaller):
            shutil.copymode(path, smaller)
            smaller.replace(path)
            freed += gain
        else:
            smaller.unlink(missing_ok=True)
    return Saved("symbols of libraries: only a debugger reads them", freed)


def main(arguments: list[str] | None = None) -> int:
    """Slim one site-packages folder and print what that saved. Exit code 2: it does not fit the rules."""
    parser = argparse.ArgumentParser(description="Remove what serving never reads.")
    parser.add_argument("site", type=Path, help="the site-packages folder")
    parser.add_argument("--no-strip", action="store_true", help="keep the libraries' symbols")
    parser.add_argument(
        "--system",
        type=Path,
        metavar="FOLDER",
        help="share the OpenSSL in this folder with PostgreSQL's driver",
    )
    chosen = parser.parse_args(arguments)
    if not (chosen.site / "gradio").is_dir():
        print(f"{chosen.site} is not a site-packages folder with the app's packages", file=sys.stderr)
        return 2
    if not chosen.no_strip and shutil.which("strip") is None:
        print("strip is not on the PATH (Debian: binutils); --no-strip does without", file=sys.stderr)
        return 2
    before = size_of(chosen.site)
    try:
        for saved in apply(RULES, chosen.site):
            print(f"{saved.bytes / MB:7.1f} MB  {saved.what}")
        for saved in fell(TRUNKS, chosen.site / "gradio/templates/frontend"):
            print(f"{saved.bytes / MB:7.1f} MB  {saved.what}")
        if chosen.system is not None:
            saved = share_openssl(chosen.site, chosen.system)
            print(f"{saved.bytes / MB:7.1f} MB  {saved.what}")
        edit(EDITS, chosen.site)
    except SlimError as error:
        print(error, file=sys.stderr)
        return 2
    if not chosen.no_strip:
        saved = strip(chosen.site)
        print(f"{saved.bytes / MB:7.1f} MB  {saved.what}")
    print(f"{before / MB:7.1f} MB before, {size_of(chosen.site) / MB:.1f} MB after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
