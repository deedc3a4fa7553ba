"""Schemas of options and records, checked by pydantic: what is wrong with one is a single line that names the field.

Numbers on the command line, in TOML and in YAML are read by one function, as TOML writes them, or as `.5` and `5.`.
"""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import InputError, one_line


def fault_of(error: ValidationError) -> tuple[str, str]:
    """The first field that is wrong (`losses.0.nats`), and what is wrong with it."""
    fault = error.errors()[0]
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return place, "is missing"
    unknown = fault["type"] == "extra_forbidden"
    problem = "is not known" if unknown else re.sub(r"^\w+ should", "must", fault["msg"])
    return place, f"{problem}, got {one_line(repr(fault['input']), 100)}"


class Options(BaseModel):
    """Options of a verb: immutable, without unknown names. Raises `InputError` for the first one that is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            place, problem = fault_of(error)
            raise InputError(place.partition(".")[0], problem) from None


class Record(BaseModel):
    """What one run writes and a later one reads. Its fields have the names that are on the disk."""

    model_config = ConfigDict(frozen=True)


_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]")


def read_number(text: str) -> int | float | None:
    """Return the number that a whole text is; None: it is none.

    `1e3` is the whole number 1000, and `1000.0` is not one. A leading zero is refused: YAML 1.1 reads `010` as 8.
    """
    if not _NUMBER.fullmatch(text) or _LEADING_ZERO.match(text) or "__" in text or text.endswith("_"):
        return None
    try:
        return int(text)
    except ValueError:
        value = float(text)
    is_whole = "." not in text and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value
