"""How the command line talks: errors in one line, stories as they come, figures for people or for machines.

`story.py` imports this file for every verb, `--help` included, so it loads nothing heavy itself.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from model.errors import GenerationError, MissingExtraError, StoryError
from model.files import print_json

if TYPE_CHECKING:
    from model.generation import GenerationRequest
    from model.settings import Settings

TRAIN = ("huggingface_hub", "mlflow", "onnx", "optuna", "psutil", "safetensors", "scipy", "torch")
EXTRA_OF = {"modal": "modal", **dict.fromkeys(TRAIN, "train")}
"""Which optional set brings a package that a verb may find missing."""


class Verbs(TyperGroup):
    """The group of all verbs; turns every error into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. With `--debug` an error keeps its traceback."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise  # Typer's own: usage errors, `--help`
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            message, exit_code = in_one_line(error, ctx.invoked_subcommand or "")
            typer.echo(f"story: {message}", err=True)
            raise typer.Exit(exit_code) from None


def in_one_line(error: Exception, verb: str) -> tuple[str, int]:
    """The line for an error that ended `verb`, and the exit code."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRA_OF:
            error = MissingExtraError(f"story {verb}", EXTRA_OF[package])
    if isinstance(error, StoryError):
        message, exit_code = str(error), error.exit_code
    elif isinstance(error, OSError) and error.filename is not None:
        message, exit_code = f"{error.filename}: {(error.strerror or 'cannot be used').lower()}", 2
    else:
        message = f"{type(error).__name__}: {error} (a fault in story; `story --debug {verb} …` shows where)"
        exit_code = 1
    return " ".join(message.split()), exit_code


def write_story(request: "GenerationRequest", folder: Path, settings: "Settings", *, as_json: bool) -> None:
    """Write one story to stdout, chunk by chunk, or whole as JSON; its figures go to stderr.

    Raises `ModelError` when there is no usable model and `GenerationError` when the story broke off.
    """
    from model.serving.backend import LocalBackend

    backend = LocalBackend.load(settings.model_copy(update={"story_model": str(folder), "story_slots": 1}))
    with backend.engine as engine:
        if as_json:
            completion = engine.submit(request).wait()
        else:
            typer.secho(request.prompt, dim=True, nl=False)
            try:
                for chunk in (stream := engine.submit(request)):
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
            finally:
                typer.echo()  # also after Ctrl-C, so that the shell's prompt gets a line of its own
            completion = stream.completion
    if completion.finish_reason == "error":
        raise GenerationError(completion.error or "the model could not go on")
    usage, seed = completion.usage, request.sampling.seed
    if as_json:
        figures = {name: getattr(usage, name) for name in usage.__dataclass_fields__}
        print_json(
            {
                "prompt": request.prompt,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "seed": seed,
                "usage": {**figures, "tokens_per_second": usage.tokens_per_second},
            }
        )
    else:
        rate = f"{usage.tokens_per_second:,.0f} tokens/s"
        first = f"first token in {usage.ttft * 1000:.0f} ms"
        typer.echo(f"{usage.completion_tokens} tokens · {rate} · {first} · seed {seed}", err=True)


def print_rows(values: dict[str, Any]) -> None:
    """One `name value` a line, numbers to four digits; what lies in a group is called `group.name`."""
    rows = dict(_rows(values))
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:{width}}  {f'{value:.4f}' if isinstance(value, float) else value}")


def _rows(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(entry, dict) for entry in value):
        inside = {str(number): entry for number, entry in enumerate(value, 1)}.items()
    else:
        yield name, value
        return
    for key, entry in inside:
        yield from _rows(entry, f"{name}.{key}" if name else key)
