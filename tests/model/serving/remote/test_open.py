"""Which backend a name and the settings open."""

from __future__ import annotations

import pytest
from typer import TyperException
from typer.main import get_command

import story
from model.errors import InputError
from model.serving.backend import LocalBackend
from model.serving.remote import BACKENDS, open_backend
from model.serving.remote.failover import FailoverBackend
from model.serving.remote.modal import ModalBackend
from model.settings import Settings
from tests.model.serving.http.serving import paced, serving

NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize("kind", ["auto", "local"])
def test_without_use_modal_stories_are_written_here_even_with_an_address(kind: str) -> None:
    backend = open_backend(kind, Settings(story_slots=1, modal_endpoint_url=NOWHERE))
    assert isinstance(backend, LocalBackend)


def test_with_use_modal_auto_has_both_and_takes_its_times_from_the_settings() -> None:
    settings = Settings(
        story_slots=1,
        use_modal=True,
        modal_endpoint_url=NOWHERE,
        story_response_timeout=0.7,
        story_breaker_failures=2,
    )
    backend = open_backend("auto", settings)
    assert isinstance(backend, FailoverBackend)
    assert backend.capacity == backend.modal.capacity
    health = backend.health()
    assert (health.ready, health.served_by, health.breaker) == (True, "modal", "closed")
    assert health.engine is not None


def test_modal_alone_needs_an_address() -> None:
    with pytest.raises(InputError, match=r"^MODAL_ENDPOINT_URL must be set to use Modal$"):
        open_backend("modal", Settings())


def test_modal_alone_asks_the_service_which_model_it_has() -> None:
    there = paced()[0]
    with serving(there) as running:
        backend = open_backend("modal", Settings(modal_endpoint_url=running.url))
    assert isinstance(backend, ModalBackend)
    assert backend.model == there.model
    assert open_backend("modal", Settings(modal_endpoint_url=NOWHERE)).model.version == "unknown"


def test_the_command_line_offers_the_same_names() -> None:
    command = get_command(story.app).commands["demo"]  # type: ignore[attr-defined]
    for name in BACKENDS:
        assert command.make_context("demo", ["--backend", name]).params["backend"] == name
    with pytest.raises(TyperException, match="cloud"):
        command.make_context("demo", ["--backend", "cloud"])
