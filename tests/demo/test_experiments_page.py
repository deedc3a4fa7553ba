"""The Experiments page as Gradio will serve it: private, unqueued, read only, and absent when it is off."""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr
import httpx
import pytest

from demo import page, theme
from demo.experiments_page import PATH, open_reader
from experiments.dashboard.client import StoreClient
from model.serving.session import GenerationManager
from model.settings import load_settings
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import serve
from tests.demo.test_experiments_handlers import Runs, row


@pytest.fixture
def client(tmp_path: Path) -> StoreClient:
    return StoreClient(f"sqlite:///{tmp_path}/mlflow.db")


def test_only_what_writes_waits_in_the_queue_and_is_a_public_api(client: StoreClient) -> None:
    blocks = page.build(GenerationManager(ScriptedBackend("A story.")), experiments=client)
    ours = [fn for fn in blocks.fns.values() if fn.page == PATH and fn.fn is not None]
    reading = {"on_open", "on_news", "on_choice", "on_row", "on_sample_run"}
    assert {fn.name for fn in ours} == {*reading, "on_grow", "grow_up"}
    assert {fn.name for fn in ours if fn.queue} == {"on_grow", "grow_up"}
    assert {fn.name for fn in ours if fn.api_visibility != "private"} == {"grow_up"}
    written = [fn for fn in blocks.fns.values() if fn.page == "" and fn.fn is not None]
    assert {fn.name for fn in written} >= {"on_story", "on_load"}, "they stay on their own page"


def test_no_template_is_ever_filled_with_text(client: StoreClient) -> None:
    # Gradio runs a filled template as JavaScript: see `demo.page`.
    blocks = page.build(GenerationManager(ScriptedBackend("A story.")), experiments=client)
    filled = {"note", "curves", "learn", "grow", "no-benchmarks", "versions"}
    parts = [block for block in blocks.blocks.values() if getattr(block, "elem_id", None) in filled]
    assert len(parts) == len(filled)
    for part in parts:
        assert isinstance(part, gr.HTML)
        assert "{" not in (part.html_template or "{")
        assert "innerHTML" not in (part.js_on_load or "innerHTML")
    for name in ("curves.js", "learn.js", "grow.js", "versions.js", "experiments.js"):
        assert "innerHTML" not in theme.asset(name)


@pytest.mark.parametrize(
    ("setting", "stage", "shown"),
    [
        ("", "DEV", True),
        ("", "TEST", True),
        ("", "PROD", False),
        ("auto", "PROD", False),
        ("true", "PROD", True),
        ("false", "DEV", False),
    ],
)
def test_settings_decide_whether_there_is_such_a_page(
    setting: str, stage: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORY_EXPERIMENTS", setting)
    monkeypatch.setenv("STAGE", stage)
    assert (open_reader(load_settings()) is not None) == shown


def test_the_page_lies_beside_the_one_that_writes_and_each_links_to_the_other(
    client: StoreClient, tmp_path: Path
) -> None:
    with serve(ScriptedBackend("A story."), experiments=client) as served:
        assert httpx.get(f"{served.url}{PATH}", timeout=None).status_code == 200
        home, other = (httpx.get(served.url + place, timeout=None).text for place in ("", PATH))
    assert f'href=\\"./{PATH}\\"' in home
    assert 'href="./"' in other
    assert list(tmp_path.iterdir()) == []


def test_without_it_there_is_neither_page_nor_link() -> None:
    with serve(ScriptedBackend("A story.")) as served:
        assert httpx.get(f"{served.url}{PATH}", timeout=None).status_code == 404
        assert re.search(rf"\./{PATH}", httpx.get(served.url, timeout=None).text) is None


def test_a_pressed_sweep_is_unfolded_in_one_tab_only() -> None:
    trials = [
        row(id=name * 32, name=name, sweep="rates", bits_per_byte=bits) for name, bits in (("a", 1.2), ("b", 1.1))
    ]
    with serve(ScriptedBackend("A story."), experiments=Runs(*trials)) as served, httpx.Client(timeout=None) as client:
        config = client.get(f"{served.url}config").json()
        (press,) = [
            each["id"] for each in config["dependencies"] if any(target[1] == "select" for target in each["targets"])
        ]

        def pressed(tab: str, *cells: str) -> list[str]:
            event = {"index": [0, 0], "value": cells[0], "row_value": cells, "selected": True}
            body = {"data": [[], ["training"], None], "event_data": event, "fn_index": press, "session_hash": tab}
            _, _, table, _ = client.post(f"{served.url}gradio_api/run/predict", json=body).json()["data"]
            return [cells[0] for cells in table["data"]]

        assert pressed("one", "▸ rates", "sweep") == ["▾ rates", "b", "a"]
        assert pressed("two", "▸ rates", "sweep") == ["▾ rates", "b", "a"], "each tab has its own"
        assert pressed("one", "▾ rates", "sweep") == ["▸ rates"]
