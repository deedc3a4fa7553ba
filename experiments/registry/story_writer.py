"""A registered version as MLflow loads it: this file is the model's code (models-from-code).

`mlflow.pyfunc.load_model("models:/story-writer@champion").predict(frame)` and `mlflow models serve` run it, on the
engine that serves everywhere else. It needs neither torch nor this checkout (`package` packs the code), and a seeded
row gives the story that `story write` gives for that seed. A row without one, or with -1, gets a seed of its own, which
comes back in column `seed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from model.engine.load import load_engine
from model.errors import InputError, StoryError
from model.generation import Completion, GenerationRequest, SamplingParams, new_seed
from model.wishes import Wishes

if TYPE_CHECKING:
    from model.engine.engine import Engine
    from model.engine.stream import Stream

OUTPUTS = ("story", "finish_reason", "tokens", "seed", "error")
ARTIFACT = "model"
"""The artifact that holds the model folder."""
INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed")
"""Integers, even where a frame or a JSON body made floats of them."""
SLOTS = 16
WISHES = tuple(field.name for field in fields(Wishes))


class StoryWriter(PythonModel):
    """Prompts in, stories out, by column `prompt`; other columns, or `params` for all rows, set the sampling.

    The input is a frame, a list of records, or a mapping of columns; `stop` is a text or a list of texts.
    """

    def load_context(self, context: Any) -> None:
        """Load the engine from the version's model folder; its digest is checked."""
        from pathlib import Path

        self._engine: Engine = load_engine(Path(context.artifacts[ARTIFACT]), slots=SLOTS, queue_limit=10_000)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row a prompt: `story` (the continuation), `finish_reason`, `tokens`, `seed`, `error`.

        All rows are generated as one batch. A row with a value that is not allowed says so in `error`; the other
        rows are not affected.
        """
        streams: list[Stream | str] = []
        for values in _rows(model_input):
            try:
                streams.append(self._engine.submit(_request(values, params)))
            except StoryError as error:
                streams.append(str(error))
        frame = pd.DataFrame([_row(stream) for stream in streams], columns=list(OUTPUTS))
        return frame.astype({"tokens": "int64", "seed": "int64"})

    def predict_stream(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Stream the story of one row. Closing the iterator stops it.

        Raises:
            ValueError: not exactly one row, or a value that is not allowed.
        """
        rows = list(_rows(model_input))
        if len(rows) != 1:
            raise ValueError(f"predict_stream takes one prompt, got {len(rows)}")
        try:
            request = _request(rows[0], params)
        except StoryError as error:
            raise ValueError(str(error)) from None
        with self._engine.submit(request) as stream:
            for chunk in stream:
                if chunk.text:
                    yield chunk.text


def _rows(model_input: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Each row's values by name; columns that are empty there are left out.

    MLflow hands over a mapping as it is or as a frame of one row, also where it is one of columns.
    """
    if isinstance(model_input, pd.DataFrame) and len(model_input) == 1:
        model_input = model_input.iloc[0].to_dict()
    if not isinstance(model_input, pd.DataFrame):
        columns = pd.api.types.is_list_like(model_input.get("prompt"))
        model_input = pd.DataFrame(model_input if columns else [model_input])
    for record in model_input.to_dict("records"):
        yield {
            str(name): value for name, value in record.items() if pd.api.types.is_list_like(value) or not pd.isna(value)
        }


def _request(values: Mapping[str, Any], params: Mapping[str, Any] | None) -> GenerationRequest:
    """The request of one row; what the row does not say, `params` say. Raises `InputError`."""
    merged = {**{name: value for name, value in (params or {}).items() if value is not None}, **values}
    for name in INTEGERS:
        if isinstance(merged.get(name), float) and float(merged[name]).is_integer():
            merged[name] = int(merged[name])  # a column with a gap has become one of floats
    if merged.get("seed", -1) == -1:
        merged["seed"] = new_seed()
    stop, wishes = merged.get("stop", ()), merged.get("wishes") or {}
    if not isinstance(wishes, dict) or wishes.keys() - WISHES:
        raise InputError("wishes", f"must be an object with {', '.join(WISHES)}, got {wishes!r}")
    sampling = {field.name: merged[field.name] for field in fields(SamplingParams) if field.name in merged}
    return GenerationRequest(
        prompt=cast(str, merged.get("prompt")),
        sampling=SamplingParams(**sampling),
        wishes=Wishes(**wishes | {"words": tuple(wishes.get("words") or ())}),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **({"max_tokens": merged["max_tokens"]} if "max_tokens" in merged else {}),
    )


def _row(stream: Stream | str) -> tuple[str, str, int, int, str]:
    if isinstance(stream, str):
        return "", "error", 0, -1, stream
    done: Completion = stream.wait()
    seed = stream.request.sampling.seed
    return done.text, done.finish_reason, done.usage.completion_tokens, seed, done.error or ""


set_model(StoryWriter())
