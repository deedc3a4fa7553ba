"""The points of a training run's curves, and the file that keeps those which never reached the tracking store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from model.files import write_atomically
from model.outbox import Leftover


class Point(NamedTuple):
    """One value of one curve."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970, when it was measured."""
    step: int


def write_leftover(path: Path, leftover: Leftover[Point]) -> None:
    """Write what was not sent, one point or file a line; the file is replaced atomically."""
    lines = [json.dumps({"point": point}) for point in leftover.items]
    lines += [json.dumps({"path": name, "text": text}) for name, text in leftover.files.items()]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_leftover(path: Path) -> tuple[list[Point], dict[str, str]]:
    """Read what `write_leftover` wrote; a damaged file raises `ValueError`, `TypeError` or `KeyError`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [Point(*line["point"]) for line in lines if "point" in line]
    return points, {line["path"]: line["text"] for line in lines if "point" not in line}
