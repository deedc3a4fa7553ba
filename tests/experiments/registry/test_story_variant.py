"""Variants that are registered versions, resolved in a real MLflow store when the demo starts."""

from __future__ import annotations

import pytest

from demo.routing import RoutingBackend, open_variants
from experiments.registry.versions import Version
from model.errors import InputError
from model.generation import GenerationRequest
from model.serving.backend import LocalBackend
from model.settings import Settings
from tests.demo.scripted import ScriptedBackend


async def test_an_alias_becomes_an_engine_over_the_version_it_names(registered: tuple[str, Version]) -> None:
    tracking_uri, version = registered
    settings = Settings(mlflow_tracking_uri=tracking_uri, story_split="default:1,challenger:3", story_slots=1)
    backend = open_variants(lambda: ScriptedBackend("A story."), settings)
    assert isinstance(backend, RoutingBackend)
    variant = backend.variants["challenger"]
    assert isinstance(variant, LocalBackend)
    assert (variant.model.number, variant.model.version) == (version.number, version.digest)
    assert variant.model.name == f"story-writer {version.number}"
    user = next(f"v{n}" for n in range(100) if backend.split.assign(f"v{n}") == "challenger")
    async with backend.running():  # the files it was loaded from are gone by now
        stream = await backend.submit(GenerationRequest(prompt="Once", max_tokens=5, user=user))
        assert sum([len(chunk.tokens) async for chunk in stream]) > 0
    with pytest.raises(InputError, match=r"STORY_SPLIT names the variant 'champion', and the version must be a number"):
        open_variants(lambda: ScriptedBackend(""), Settings(mlflow_tracking_uri=tracking_uri, story_split="champion:1"))
