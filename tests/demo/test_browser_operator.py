"""An operator in a real browser: over a real registry, read and moved by a real process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from pydantic import SecretStr

from demo import operator as module
from demo.experiments_page import PATH
from experiments.dashboard.client import StoreClient
from experiments.gate.run import rollback
from model.settings import ServiceOptions, Settings
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, opening, violations
from tests.demo.test_operator import TOKEN, aliases
from tests.experiments.gate.promoted import judged
from tests.experiments.gate.worse import thresholds

pytestmark = IN_A_BROWSER
FIRST_TIMEOUT = 120_000
"""Milliseconds in which MLflow may be loaded, on a machine that does other things as well."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a registry whose challenger has passed the gate, and of the thresholds; made before a browser runs a loop."""
    folder = tmp_path_factory.mktemp("registry")
    thresholds(folder)
    judged(folder)
    return folder


def test_an_operator_promotes_and_rolls_back_and_the_page_shows_it_at_once(
    folder: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "THRESHOLDS", folder / "thresholds.yaml")
    uri = f"sqlite:///{folder}/mlflow.db"
    options = ServiceOptions(settings=Settings(story_operator_token=SecretStr(TOKEN)))
    client = StoreClient(uri, ttl=600, first_timeout=FIRST_TIMEOUT / 1000, timeout=60)
    with serve(ScriptedBackend("A story."), options=options, experiments=client) as served, opening(browser) as make:
        page = make(url=served.url, path=PATH, viewport={"width": 320, "height": 800}).page
        expect(page.locator("#note .note")).not_to_contain_text("Reading", timeout=FIRST_TIMEOUT)
        said, dialog = page.locator(".operator .said"), page.locator(".operator dialog")
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))

        def champion(number: int) -> None:
            expect(page.locator(f"#version-{number} .alias", has_text="champion")).to_be_attached(timeout=TIMEOUT)
            assert aliases(uri)["champion"] == number

        def sign_in(token: str) -> None:
            page.get_by_label("Operator's token").fill(token)
            page.keyboard.press("Enter")

        champion(1)
        assert page.locator(".promote").count() == 0
        sign_in("a token of somebody else")
        expect(said).to_have_text("This is not the operator's token.", timeout=TIMEOUT)
        sign_in(TOKEN)
        expect(said).to_contain_text("Signed in", timeout=TIMEOUT)
        expect(page.get_by_role("button", name="Switch deployment")).to_be_hidden()

        page.evaluate("document.querySelector('#version-2').open = true")
        page.get_by_role("button", name="Promote version 2").click()
        expect(dialog).to_contain_text("would be promoted; champion so far: version 1", timeout=FIRST_TIMEOUT)
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.keyboard.press("Escape")
        expect(said).to_have_text("Nothing was changed.", timeout=TIMEOUT)
        champion(1)
        page.get_by_role("button", name="Promote version 2").click()
        dialog.get_by_role("button", name="Promote").click(timeout=FIRST_TIMEOUT)
        expect(said).to_contain_text("is promoted", timeout=FIRST_TIMEOUT)
        champion(2)
        assert page.get_by_role("button", name="Promote version 2").count() == 0, "it is the champion"

        page.get_by_role("button", name="Roll back").first.click()
        expect(dialog).to_contain_text("would be champion again; champion so far: version 2", timeout=FIRST_TIMEOUT)
        rollback(uri)  # in a terminal, while the dialog is open
        dialog.get_by_role("button", name="Roll back").click()
        expect(dialog).to_contain_text("The registry changed meanwhile", timeout=FIRST_TIMEOUT)
        expect(dialog).to_contain_text("Now: version 2")
        dialog.get_by_role("button", name="Roll back").click()
        expect(said).to_contain_text("Version 2", timeout=FIRST_TIMEOUT)
        champion(2)

        assert not any(TOKEN in url for url in [page.url, *sent])
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert TOKEN not in kept
        page.reload()
        expect(page.get_by_label("Operator's token")).to_be_visible(timeout=FIRST_TIMEOUT)
        expect(page.get_by_role("button", name="Roll back")).to_be_hidden()
