"""Registered versions as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from experiments.registry.versions import Version


def print_versions(versions: Sequence[Version], console: Console | None = None) -> None:
    """One row a version; one line that says what to do where there is none."""
    console = console or Console()
    if not versions:
        console.print("No version is registered yet; `story register` makes one.")
        return
    table = Table("version", "digest", "aliases", "gate", "bits per byte", "step", "made (UTC)")
    for version in versions:
        tags = version.tags
        bits = tags.get("model.best_bits_per_byte", "")
        table.add_row(
            str(version.number),
            version.digest[:12],
            ", ".join(version.aliases),
            tags.get("gate", "not judged"),
            f"{float(bits):.4f}" if bits else "",
            tags.get("model.step", ""),
            f"{datetime.fromtimestamp(version.created / 1000, UTC):%Y-%m-%d %H:%M}",
        )
    console.print(table)


def print_version(version: Version, *, as_json: bool = False) -> None:
    """One version: as JSON, or in one sentence."""
    if as_json:
        print(json.dumps(version.as_dict(), indent=2))
        return
    made = "registered" if version.new else "was registered before"
    known = f", known as {', '.join(version.aliases)}" if version.aliases else ""
    print(f"version {version.number} ({version.digest[:12]}) {made}{known}")
