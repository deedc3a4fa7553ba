"""A link that reopens the same prompt and settings.

Everything is in the query string and nothing is stored, so a link works on every replica. It names the model's version,
because another version writes another story from the same seed. Input is untrusted: a value that cannot be used is
left at its default and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from demo.form import FIELDS, Form, check_field, labelled
from model.errors import InputError, one_line

MAX_QUERY = 16_000
"""Characters of a query string. Servers refuse a longer request line sooner or later; ours does at 64 KiB."""

VERSION_CHARS = 12
"""Leading characters of the model's digest that a link carries: 48 bits, enough to distinguish versions."""

_WHOLE = frozenset({"max_tokens", "top_k", "seed"})


def encode(form: Form, version: str) -> str:
    """The query string (without `?`) that reopens `form` as written by the model with digest `version`.

    Every field is written, defaults too, so that a link keeps its meaning when defaults change.
    Raises `InputError` when the prompt is too long to travel in an address.
    """
    values = {name: getattr(form, name) for name in FIELDS} | {"model": version[:VERSION_CHARS]}
    # A number as one would write it: 0.7, not 0.69999; 1, not 1.0.
    plain = {name: f"{value:.10g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    query = urlencode(plain, quote_via=quote)
    if len(query) > MAX_QUERY:
        raise InputError("prompt", "is too long to travel in a link")
    return query


def decode(query: Mapping[str, str], version: str) -> tuple[dict[str, Any], list[str]]:
    """Read a query string's usable values, by field, for the model with digest `version`.

    Return them with a sentence for each thing the user should know: a value left out, another model version. Unknown
    names are left alone.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    for name in FIELDS:
        if name not in query:
            continue
        value = _parse(name, query[name])
        problem = check_field(name, value)
        if problem is None:
            values[name] = value
        else:  # cut, for a hostile link would fill the page with it
            notes.append(f"A value of the link could not be used. {one_line(labelled(problem), 120)}.")
    if values and (linked := query.get("model", "")) and linked[:VERSION_CHARS] != version[:VERSION_CHARS]:
        notes.append("This link was made with another version of the model, so the story will differ.")
    return values, notes


def _parse(name: str, text: str) -> Any:
    """The value that `text` spells for this field, or `text` itself, which no number field accepts."""
    if name == "prompt":
        return text
    if not text.isascii() or "_" in text or len(text) > 40:
        return text
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        return text
