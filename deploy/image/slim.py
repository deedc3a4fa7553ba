"""Remove from an installation what serving never reads, and print what each rule saved.

A plain installation of the app takes about 370 MB, and a good third of it is never opened: Gradio's server-side
renderer and sample media, a second copy of ONNX Runtime for programs in C, test suites. `RULES` lists patterns with
their reasons. A pattern that matches nothing is an error, because then a package has changed and its rule is out of
date. `deploy/image/warm.py` then checks that the app still works by generating a story.

    python deploy/image/slim.py /opt/story/venv/lib/python3.12/site-packages
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

MB = 1e6
RULES = {
    "hf_xet": "uploads to and fast downloads from the Hugging Face hub",
    "onnxruntime/capi/libonnxruntime.so*": "for programs in C; the Python module holds its own copy",
    "onnxruntime/transformers": "makes and converts graphs; ours are exported already",
    "onnxruntime/quantization": "as above",
    "gradio/templates/node": "renders pages in Node.js, which is off and not installed",
    "gradio/templates/frontend/static/ffmpeg": "cuts videos in the browser; the page shows none",
    "gradio/templates/frontend/static/bokeh": "draws Bokeh plots, and Bokeh is not installed",
    "gradio/templates/frontend/static/fonts": "fonts of Gradio's own themes; the page's theme uses none",
    "gradio/templates/frontend/assets/PlotlyPlot-*": "draws Plotly plots, and Plotly is not installed",
    "gradio/media_assets": "sample pictures, sounds and films for Gradio's own demos",
    "**/tests": "test suites",
    "numpy/_core/_simd.*.so": "for tests of numpy's vector code",
    "pillow.libs/libavif-*": "pictures in AVIF; the page takes no pictures",
    "google/*": "reads graphs in Python; ONNX Runtime does so in C++",
    "pygments/lexers/[a-z]*.py": "highlights code in 500 languages; nothing here shows code",
    "**/*.py[ix]": "types for editors, and Cython sources",
}
"""Patterns below site-packages, and why serving does without what they match. A folder goes with all it holds."""


class SlimError(Exception):
    """A rule does not fit the installation; the message is one line."""


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(size_of(below) for below in path.iterdir())


def apply(pattern: str, site: Path) -> int:
    """Remove what `pattern` matches below `site`; return the bytes freed. Raises `SlimError` if nothing matches."""
    found = sorted(site.glob(pattern))
    if not found:
        raise SlimError(f"{pattern} matches nothing in {site}: drop it from RULES or correct it")
    freed = 0
    for path in found:
        if path.is_symlink():
            path.unlink()
        elif path.exists():  # else it lay in a folder that another match removed
            freed += size_of(path)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return freed


def main(arguments: list[str] | None = None) -> int:
    """Slim one site-packages folder and print what that saved. Exit code 2: it does not fit the rules."""
    parser = argparse.ArgumentParser(description="Remove what serving never reads.")
    parser.add_argument("site", type=Path, help="the site-packages folder")
    site: Path = parser.parse_args(arguments).site
    if not (site / "gradio").is_dir():
        print(f"{site} is not a site-packages folder with the app's packages", file=sys.stderr)
        return 2
    before = size_of(site)
    try:
        for pattern, reason in RULES.items():
            print(f"{apply(pattern, site) / MB:7.1f} MB  {pattern}: {reason}")
    except SlimError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{before / MB:7.1f} MB before, {size_of(site) / MB:.1f} MB after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
