"""The description of the service in OpenAPI, and how routes take part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"

Handler = TypeVar("Handler", bound=Callable[..., Any])


def get(routes: APIRouter, path: str, **options: Any) -> Callable[[Handler], Handler]:
    """Register a handler of GET, and of HEAD, which the document leaves out; `options` as for `APIRouter.get`."""

    def register(handler: Handler) -> Handler:
        routes.head(path, include_in_schema=False)(handler)
        return routes.get(path, **options)(handler)

    return register


def body_schema(body: type[BaseModel]) -> dict[str, Any]:
    """Return `openapi_extra` of a route that reads its body itself, as `body`."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def schemas_of(*bodies: type[BaseModel]) -> dict[str, Any]:
    """Return the schemas that `body_schema` refers to, and those within them, by name."""
    _, document = models_json_schema([(body, "validation") for body in bodies], ref_template=REFERENCE)
    schemas: dict[str, Any] = document["$defs"]
    return schemas
