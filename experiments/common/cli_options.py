"""Typer options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

REFERENCE = "Model folder, pretrained, models:/story-writer@ALIAS or models:/story-writer/NUMBER."
"""What `--model` takes."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a machine instead of text.")]
Track = Annotated[bool, typer.Option(help="Log to MLflow.")]
ThresholdsFile = Annotated[
    Path | None, typer.Option("--thresholds", help="File of thresholds. Default: experiments/thresholds.yaml.")
]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Also write the report as Markdown here.")]
