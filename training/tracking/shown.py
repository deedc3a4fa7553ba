"""How a run's facts are written for a reader of MLflow: flat parameters, and pages of sample stories."""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from training.trainer.report import EvaluationReport

COLUMNS = ("step", "tokens", "loss", "bits_per_byte", "prompt", "continuation")
"""Of the table of sample stories."""


def flat(recipe: dict[str, Any]) -> dict[str, str]:
    """A nested recipe as MLflow parameters: `{"model": {"width": 256}}` → `{"model.width": "256"}`.

    Texts stay as they are, all else is written as JSON. Of an absolute path only the last name is shown.
    """
    params: dict[str, str] = {}
    for key, value in without_folders(recipe).items():
        if isinstance(value, dict) and value:
            params |= {f"{key}.{inner}": text for inner, text in flat(value).items()}
        else:
            params[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return params


def without_folders(value: Any) -> Any:
    """The same plain values, each absolute path cut down to its last name: folders may name people."""
    if isinstance(value, dict):
        return {str(key): without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def samples_page(report: EvaluationReport) -> str:
    """The sample stories of one evaluation as Markdown."""
    best = ", the best so far" if report.best else ""
    lines = [
        f"# Step {report.step:,}",
        "",
        f"{report.tokens:,} tokens seen; validation loss {report.loss:.4f} nats a token, "
        f"{report.bits_per_byte:.4f} bits per byte{best}.",
    ]
    for number, (prompt, continuation) in enumerate(report.samples, start=1):
        story = (prompt + continuation).splitlines() or [""]
        lines += ["", f"## Story {number}", "", *(f"> {line}".rstrip() for line in story)]
    return "\n".join(lines) + "\n"


def samples_rows(report: EvaluationReport) -> list[list[Any]]:
    """The same as rows of `COLUMNS`, one a story; JSON has no NaN, so such a figure is `None`."""
    figures = [value if math.isfinite(value) else None for value in (report.loss, report.bits_per_byte)]
    return [[report.step, report.tokens, *figures, *sample] for sample in report.samples]
