"""The description of the service in OpenAPI, and how routes take part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter

Handler = TypeVar("Handler", bound=Callable[..., Any])


def get(routes: APIRouter, path: str, **options: Any) -> Callable[[Handler], Handler]:
    """Register a handler of GET, and of HEAD, which the document leaves out; `options` as for `APIRouter.get`."""

    def register(handler: Handler) -> Handler:
        routes.head(path, include_in_schema=False)(handler)
        return routes.get(path, **options)(handler)

    return register
