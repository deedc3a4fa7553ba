"""Options of a verb, checked by pydantic; what is wrong with one is an `InputError` that names it."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import InputError


class Options(BaseModel):
    """Base class: immutable, without unknown names. Raises `InputError` for the first option that is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            fault = error.errors()[0]
            unknown = fault["type"] == "extra_forbidden"
            problem = "is not known" if unknown else re.sub(r"^\w+ should", "must", fault["msg"])
            raise InputError(str(fault["loc"][0]), f"{problem}, got {fault['input']!r}") from None
