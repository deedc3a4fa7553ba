"""The OpenAPI document: whole, and of every route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.model.serving.http.serving import Running


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects within a document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def test_every_reference_leads_somewhere(shipped: Running) -> None:
    document = shipped.get("/openapi.json").json()
    references = {node["$ref"] for node in nodes(document) if "$ref" in node}
    names = {reference.removeprefix("#/components/schemas/") for reference in references}
    assert {"CompletionBody", "ChatBody", "SimpleBody", "StreamOptions", "ErrorResponse"} <= names
    assert names <= document["components"]["schemas"].keys()


def test_every_field_of_a_body_has_a_description_and_its_default(shipped: Running) -> None:
    schemas = shipped.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionBody", "ChatBody", "SimpleBody"):
        schema = schemas[name]
        assert schema["additionalProperties"] is False
        for field, described in schema["properties"].items():
            assert described.get("description"), field
            assert (field in schema.get("required", [])) != ("default" in described)


def test_every_response_of_success_has_a_schema_and_errors_have_their_own(shipped: Running) -> None:
    paths = shipped.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                schemas = [content.get("schema") for content in response.get("content", {}).values()]
                if path != "/metrics" and status == "200":
                    assert any(schema for schema in schemas)
                if status >= "400" and path != "/api/health":
                    assert schemas == [{"$ref": "#/components/schemas/ErrorResponse"}]
