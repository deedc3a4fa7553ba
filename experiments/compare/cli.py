"""The verb `story compare`. `story --help` imports this file, so it loads nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from experiments.common.cli_options import Json


def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN_OR_VERSION",
            help="A run's name or the beginning of its id, a version's number or alias. Default: the newest runs.",
        ),
    ] = None,
    newest: Annotated[int, typer.Option(min=1, help="Without names: so many training runs.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Also write curves (PNG), tables (CSV) and a page (Markdown) here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show training runs and registered versions side by side: figures, curves, and what differs between them."""
    from rich.console import Console

    from experiments.compare.choose import choose
    from experiments.compare.frames import curves, differences, table
    from experiments.compare.render import as_plain, print_comparison, write_files
    from model.settings import load_settings

    uri = load_settings().mlflow_tracking_uri
    subjects = choose(uri, names or (), newest=newest)
    figures, unlike = table(uri, subjects), differences(subjects)
    written = [] if out is None else write_files(out, figures, unlike, curves(uri, subjects))
    if as_json:
        plain = as_plain(figures, unlike) | {"files": [str(path) for path in written]}
        typer.echo(json.dumps(plain, ensure_ascii=False, indent=2))
        return
    print_comparison(figures, unlike, Console())
    for path in written:
        typer.echo(f"wrote {path}")
