"""A registered version as MLflow loads it: this file is the model's code (models-from-code).

`mlflow.pyfunc.load_model("models:/story-writer@champion").predict(frame)` and `mlflow models serve` run it, on the
engine that serves everywhere else. It needs neither torch nor this checkout (`package` packs the code), and a seeded
row gives the story that `story write` gives for that seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from model.engine.load import load_engine
from model.errors import StoryError
from model.generation import Completion, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from model.engine.engine import Engine
    from model.engine.stream import Stream

ARTIFACT = "model"
"""The artifact that holds the model folder."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
INTEGERS = ("max_tokens", "top_k", "seed")
"""Integers, even where a frame or a JSON body made floats of them."""
SLOTS = 16


class StoryWriter(PythonModel):
    """Prompts in, stories out, by column `prompt`; other columns, or `params` for all rows, set the sampling."""

    def load_context(self, context: Any) -> None:
        """Load the engine from the version's model folder; its digest is checked."""
        from pathlib import Path

        self._engine: Engine = load_engine(Path(context.artifacts[ARTIFACT]), slots=SLOTS, queue_limit=10_000)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row a prompt: `story` (the continuation), `finish_reason`, `tokens`, `error`.

        All rows are generated as one batch. A row with a value that is not allowed says so in `error`; the other
        rows are not affected.
        """
        streams: list[Stream | str] = []
        for values in _rows(model_input):
            try:
                streams.append(self._engine.submit(_request(values, params)))
            except StoryError as error:
                streams.append(str(error))
        rows = [_row(stream if isinstance(stream, str) else stream.wait()) for stream in streams]
        frame = pd.DataFrame(rows, columns=["story", "finish_reason", "tokens", "error"])
        return frame.astype({"tokens": "int64"})

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

    A stream's one record may come as a mapping: MLflow makes no frame of it there.
    """
    frame = model_input if isinstance(model_input, pd.DataFrame) else pd.DataFrame([model_input])
    for record in frame.to_dict("records"):
        yield {str(name): value for name, value in record.items() if not pd.isna(value)}


def _request(values: Mapping[str, Any], params: Mapping[str, Any] | None) -> GenerationRequest:
    """The request of one row; what the row does not say, `params` say. Raises `InputError`."""
    merged = {**{name: value for name, value in (params or {}).items() if value is not None}, **values}
    for name in INTEGERS:
        if isinstance(merged.get(name), float) and float(merged[name]).is_integer():
            merged[name] = int(merged[name])  # a column with a gap has become one of floats
    sampling = SamplingParams(**{name: merged[name] for name in SAMPLING if name in merged})
    chosen = {"max_tokens": merged["max_tokens"]} if "max_tokens" in merged else {}
    return GenerationRequest(prompt=cast(str, merged.get("prompt")), sampling=sampling, **chosen)


def _row(done: Completion | str) -> tuple[str, str, int, str]:
    if isinstance(done, str):
        return "", "error", 0, done
    return done.text, done.finish_reason, done.usage.completion_tokens, done.error or ""


set_model(StoryWriter())
