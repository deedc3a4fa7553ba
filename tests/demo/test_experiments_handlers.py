"""What the Experiments page shows of a real store, of an empty one and of none: plain functions, without the page."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from demo import experiments_handlers as handlers
from demo import theme
from demo.experiments_handlers import MOST_CHOSEN
from experiments.dashboard.client import NOTHING, StoreClient
from experiments.dashboard.recorded import export_record
from experiments.dashboard.records import Curve, Overview, RunRow, SampleSet, VersionRow
from experiments.dashboard.rows import run_rows
from experiments.quality.evidence import QualityEvidence
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.dashboard.made import Made, made, shipped
from tests.experiments.gate.promoted import promoted
from training.tracking.store import open_store


@pytest.fixture(scope="module")
def store() -> Made:
    return made()


@pytest.fixture(scope="module")
def client(store: Made) -> DirectClient:
    return DirectClient(store.uri)


def short(store: Made, name: str) -> str:
    rows, _ = run_rows(open_store(store.uri, read_only=True))
    return next(row.id[:8] for row in rows if row.name == name)


def row(**changes: Any) -> RunRow:
    usual = RunRow(
        id="0" * 32, name="a", status="finished", preset="small", started=0, minutes=1.0, tokens=5,
        bits_per_byte=1.0, parameters=1, data="d", stories=False,
    )  # fmt: skip
    return usual.model_copy(update=changes)


class Runs(StoreClient):
    """A store of made-up runs, for names and numbers that the real one does not have."""

    def __init__(self, *rows: RunRow) -> None:
        super().__init__("sqlite:///nowhere.db")
        self.rows = rows

    async def overview(self, *, stale_ok: bool = False) -> Overview:
        return Overview(runs=self.rows)

    async def curves(self, runs: Any, measure: str) -> list[Curve]:
        return [Curve(run=run, points=((1, 1, 0.5, 2.0),)) for run in runs]

    async def samples(self, run: str) -> list[SampleSet]:
        return [SampleSet(step=1, tokens=2, bits_per_byte=None, stories=(("A", "b"),))]


def test_a_filled_store_fills_the_page(store: Made, client: DirectClient) -> None:
    page = asyncio.run(handlers.opened(client, {}))
    assert page.note == "2 training runs, 2 versions, 1 benchmark."
    assert page.runs is not None
    table = [dict(zip(page.runs["headers"], cells, strict=True)) for cells in page.runs["data"]]
    written = page.runs["metadata"]["display_value"]
    assert [cells["run"] for cells in table] == ["stopped", "learned"]
    assert table[1]["tokens"] == store.trained.steps[-1].tokens
    assert written[0][4:6] == ["10,240", "0.2"], "numbers are sorted as numbers and formatted for people"
    assert [value for _, value in page.choices] == [short(store, "stopped"), short(store, "learned")]
    assert page.curves is not None
    assert page.curves["chosen"] == [value for _, value in page.choices]


def test_the_picture_holds_each_point_of_the_curves_over_tokens_and_over_minutes(
    store: Made, client: DirectClient
) -> None:
    run = short(store, "learned")
    drawn = asyncio.run(handlers.draw(client, [run], ["training", "held-out"]))
    looks = store.trained.evaluations
    assert [plot["measure"] for plot in drawn["plots"]] == drawn["measures"] == ["held-out", "training"]
    (curve,) = drawn["plots"][0]["curves"]
    assert (curve["run"], curve["name"]) == (run, "learned")
    assert curve["points"] == [
        (
            look.step,
            look.tokens,
            pytest.approx(look.elapsed / 60, abs=1e-3),
            pytest.approx(look.bits_per_byte, abs=1e-5),
        )
        for look in looks
    ]
    (losses,) = drawn["plots"][1]["curves"]
    assert len(losses["points"]) == len(store.trained.steps)


def test_pressing_a_row_takes_its_run_in_and_pressing_it_again_takes_it_out(store: Made, client: DirectClient) -> None:
    learned, stopped = short(store, "learned"), short(store, "stopped")
    both = asyncio.run(handlers.pick(client, [stopped], ["learned", "…", learned], ["held-out"]))
    assert both["chosen"] == [stopped, learned]
    one = asyncio.run(handlers.pick(client, both["chosen"], ["stopped", "…", stopped], ["held-out"]))
    assert one["chosen"] == [learned]
    none = asyncio.run(handlers.pick(client, one["chosen"], ["learned", "…", learned], ["held-out"]))
    assert (none["chosen"], none["note"]) == ([], "Choose a run above to see how it learned.")


def test_no_more_runs_are_drawn_than_have_colors() -> None:
    rows = [row(id=f"{number:08x}" + "0" * 24, name=f"r{number}") for number in range(9)]
    chosen = [each.id[:8] for each in rows]
    drawn = asyncio.run(handlers.draw(Runs(*rows), chosen, ["held-out"]))
    assert drawn["chosen"] == [curve["run"] for curve in drawn["plots"][0]["curves"]] == chosen[:MOST_CHOSEN]
    picked = asyncio.run(handlers.pick(Runs(*rows), chosen[:6], ["r8", chosen[8]], ["held-out"]))
    assert picked["chosen"] == [*chosen[1:6], chosen[8]], "the oldest choice makes room"


def test_runs_of_one_name_are_distinguished() -> None:
    rows = [row(id="a" * 32), row(id="b" * 32), row(id="c" * 32, name="other")]
    assert list(handlers.names_in_the_picture(rows).values()) == ["a aaaaaaaa", "a bbbbbbbb", "other"]


def test_an_address_chooses_runs_measure_story_and_step(store: Made, client: DirectClient) -> None:
    learned = short(store, "learned")
    query = {"runs": learned, "measure": "speed,training", "story": learned, "step": "8"}
    page = asyncio.run(handlers.opened(client, query))
    assert page.curves is not None
    assert (page.curves["chosen"], page.curves["measures"]) == ([learned], ["training", "speed"])
    assert page.samples is not None
    assert (page.samples["name"], page.samples["at"]) == ("learned", 8)


@pytest.mark.parametrize(
    "query",
    [
        {"runs": "nobody,<script>,", "measure": "x'", "story": "../..", "step": "1e9"},
        {"runs": "," * 50_000, "story": "", "step": "-1"},
    ],
)
def test_an_address_that_makes_no_sense_opens_the_page_as_usual(
    store: Made, client: DirectClient, query: dict[str, str]
) -> None:
    usual, page = (asyncio.run(handlers.opened(client, each)) for each in ({}, query))
    assert dataclasses.replace(page) == dataclasses.replace(usual)


def test_the_stories_shown_first_are_those_of_the_best_run() -> None:
    rows = [
        row(id="a" * 32, stories=True, bits_per_byte=None),
        row(id="b" * 32, stories=True, bits_per_byte=0.9, name="best"),
        row(id="c" * 32, bits_per_byte=0.1),
    ]
    page = asyncio.run(handlers.opened(Runs(*rows), {}))
    assert page.samples is not None
    assert page.samples["name"] == "best"
    assert [value for _, value in page.sampled] == ["aaaaaaaa", "bbbbbbbb"]


def test_without_a_store_the_page_shows_how_the_shipped_model_was_made(tmp_path: Path) -> None:
    record = export_record(shipped().uri, ["challenger"])
    client = DirectClient(f"sqlite:///{tmp_path}/mlflow.db", record=record)
    page = asyncio.run(handlers.opened(client, {}))
    assert page.note.startswith("1 training run, 1 version, 1 benchmark. How the shipped model was made is shown from ")
    assert page.note.endswith("`story train` adds runs of your own.")
    assert page.runs is not None
    assert [cells[1] for cells in page.runs["data"]] == ["finished, challenger, from the record"]
    assert page.curves is not None
    assert len(page.curves["plots"][0]["curves"][0]["points"]) == len(made().trained.evaluations)
    assert page.samples is not None
    assert len(page.samples["moments"]) == len(made().trained.evaluations)
    assert page.evaluations is not None
    assert page.evaluations["data"][0][0] == "version 3, from the record"
    assert page.versions is not None
    (version,) = page.versions["versions"]
    assert (version["id"], version["origin"]) == ("recorded-version-3", "from the record")
    assert version["checks"]


def test_the_trials_of_a_sweep_are_one_row_until_it_is_pressed_and_then_the_best_comes_first() -> None:
    bits = {"a": 1.3, "b": 1.1, "c": None, "d": 1.2}
    trials = [row(id=name * 32, name=name, sweep="rates", bits_per_byte=each) for name, each in bits.items()]
    trials[0] = trials[0].model_copy(update={"status": "running"})
    runs = Runs(row(id="e" * 32, name="newest"), *trials[:2], row(id="f" * 32, name="between"), *trials[2:])
    folded = handlers.runs_table(asyncio.run(runs.overview()))["data"]
    assert [(cells[0], cells[1], cells[3], cells[-1]) for cells in folded] == [
        ("newest", "finished", 1.0, "e" * 8),
        ("▸ rates", "4 trials, 1 running", 1.1, "sweep"),
        ("between", "finished", 1.0, "f" * 8),
    ]
    pressed = asyncio.run(handlers.fold(runs, folded[1], []))
    assert pressed is not None
    table, unfolded = pressed
    assert unfolded == ["rates"]
    assert [cells[0] for cells in table["data"]] == ["newest", "▾ rates", "b", "d", "a", "c", "between"]
    assert table == handlers.runs_table(asyncio.run(runs.overview()), unfolded)
    again = asyncio.run(handlers.fold(runs, table["data"][1], unfolded))
    assert again is not None
    assert again == (handlers.runs_table(asyncio.run(runs.overview())), [])
    assert asyncio.run(handlers.fold(runs, table["data"][2], unfolded)) is None, "a trial is a run like others"
    assert asyncio.run(handlers.fold(runs, [], unfolded)) is None


def test_the_first_picture_has_the_best_trial_of_each_sweep() -> None:
    trials = [row(id=f"{number:08x}" + "0" * 24, sweep="rates", bits_per_byte=2 - number / 10) for number in range(9)]
    page = asyncio.run(handlers.opened(Runs(*trials, row(id="f" * 32)), {}))
    assert page.curves is not None
    assert page.curves["chosen"] == ["00000008", "ffffffff"]
    assert len(page.choices) == 10, "the others can be chosen"


def test_a_record_has_a_run_in_the_first_picture_beside_those_of_the_store() -> None:
    own = [row(id=f"{number:08x}" + "0" * 24) for number in range(6)]
    recorded = [row(id=f"f{number:07x}" + "0" * 24, recorded=True) for number in range(6)]

    def chosen(*rows: RunRow) -> list[str]:
        return [run[0] + run[7] for run in handlers.first_chosen(Overview(runs=rows))]

    assert chosen(*own, *recorded) == ["00", "01", "02", "f0"]
    assert chosen(own[0], *recorded) == ["00", "f0", "f1", "f2"]
    assert chosen(*own) == ["00", "01", "02", "03"]
    assert chosen(*recorded) == ["f0", "f1", "f2", "f3"]


def test_what_differs_between_recipes_is_shown_and_nothing_else() -> None:
    same = {"optimizer.name": "muon", "steps": "100"}
    rows = [
        row(id="a" * 32, settings=same | {"seed": "1"}),
        row(id="b" * 32, settings=same | {"seed": "2", "init": "c0ffee"}),
        row(id="c" * 32, settings=same | {"seed": "1"}),
    ]
    assert handlers.differences(rows) == [
        {"name": "init", "values": ["", "c0ffee", ""]},
        {"name": "seed", "values": ["1", "2", "1"]},
    ]
    assert handlers.differences(rows[:1]) == []
    drawn = asyncio.run(handlers.draw(Runs(*rows), ["aaaaaaaa", "cccccccc"], ["rate"]))
    assert drawn["differences"] == []


def test_the_run_that_the_champion_came_of_is_marked() -> None:
    version = VersionRow(
        number=1, digest="d" * 64, aliases=("champion",), created=0, tags={}, decision=None, run="a" * 32
    )
    seen = Overview(runs=(row(id="a" * 32), row(id="b" * 32)), versions=(version,))
    assert [cells[1] for cells in handlers.runs_table(seen)["data"]] == ["finished, champion", "finished"]


def test_news_of_a_running_training_come_with_the_points_and_whatever_a_browser_sends_is_met() -> None:
    runs = Runs(row(id="a" * 32, status="running"), row(id="b" * 32))
    first = asyncio.run(handlers.news(runs, {"chosen": ["aaaaaaaa", "bbbbbbbb"], "measures": ["speed"]}))
    assert [each["running"] for each in first["runs"]] == [True, False]
    assert first["measures"] == ["speed"]
    again = asyncio.run(handlers.news(runs, {"chosen": ["aaaaaaaa"], "measures": ["speed"]}))
    assert again["state"] == first["state"]
    runs.rows = (row(id="a" * 32), row(id="b" * 32))
    ended = asyncio.run(handlers.news(runs, {"chosen": ["aaaaaaaa"], "measures": ["speed"]}))
    assert ended["state"] != first["state"]
    given: Any
    for given in (None, [], {"chosen": 7, "measures": {"a": 1}}, {"chosen": [["x"], "nobody"], "measures": ["'"]}):
        assert asyncio.run(handlers.news(runs, given))["chosen"] == []


def test_only_a_browser_on_this_machine_is_told_where_mlflow_is() -> None:
    assert handlers.ui_address("sqlite:///mlflow.db", local=True) == "http://127.0.0.1:5000"
    secret = "http://user:secret@mlflow.example:5000/"
    assert handlers.ui_address(secret, local=True) == "http://mlflow.example:5000"
    assert handlers.ui_address(secret, local=False) == handlers.ui_address("sqlite:///mlflow.db", local=False) == ""


def test_an_evaluation_names_the_version_and_the_stories(client: DirectClient) -> None:
    page = asyncio.run(handlers.opened(client, {}))
    assert page.evaluations is not None
    (texts,) = page.evaluations["metadata"]["display_value"]
    received = dict(zip(page.evaluations["headers"], texts, strict=True))
    quality = QualityEvidence.newest(made().uri, promoted().champion.digest)
    assert quality is not None
    assert received["model"] == "version 1"
    assert received["held-out stories"].startswith(f"{len(quality.losses)} of ")
    assert float(received["bits per byte"]) == pytest.approx(quality.metrics["bits_per_byte"], abs=1e-4)


def test_stories_are_those_that_the_run_wrote(store: Made, client: DirectClient) -> None:
    received = asyncio.run(handlers.samples(client, short(store, "learned")))
    looks = store.trained.evaluations
    assert [(each["step"], tuple(each["stories"])) for each in received["moments"]] == [
        (look.step, look.samples) for look in looks
    ]


def test_each_check_of_a_verdict_is_reported_in_words(store: Made, client: DirectClient) -> None:
    page = asyncio.run(handlers.opened(client, {}))
    assert page.versions is not None
    challenger, champion = page.versions["versions"]
    assert (challenger["aliases"], challenger["verdict"]) == (["challenger"], "")
    assert challenger["headline"] == "Not judged yet; `story gate` does it."
    assert (champion["aliases"], champion["verdict"]) == (["champion"], "fail")
    assert champion["headline"].startswith("1 passed, 1 failed, 1 undecided, judged 20")
    by_metric = {check["metric"]: check for check in champion["checks"]}
    decided = {check.threshold.metric: check for check in store.decision.checks}
    assert by_metric.keys() == decided.keys()
    bits, decided_bits = by_metric["bits_per_byte"], decided["bits_per_byte"]
    assert decided_bits.bounds is not None
    assert (bits["verdict"], bits["threshold"]) == ("fail", "≤ 0.01 bits/byte")
    assert float(bits["value"]) == pytest.approx(decided_bits.bounds.value, rel=1e-3)
    assert bits["why"] == decided_bits.why
    assert by_metric["error_rate"]["verdict"] == "undecided"
    assert by_metric["success_rate"]["why"] == "", "a check that passed needs no reason"


def test_a_benchmark_names_the_version_that_was_measured(client: DirectClient) -> None:
    page = asyncio.run(handlers.opened(client, {}))
    assert page.benchmarks is not None
    (cells,) = page.benchmarks["data"]
    (texts,) = page.benchmarks["metadata"]["display_value"]
    received = dict(zip(page.benchmarks["headers"], texts, strict=True))
    assert (received["target"], received["model"], received["succeeded, %"]) == ("local", "version 1", "100")
    assert len(cells) == len(texts) == len(page.benchmarks["headers"])


def test_a_store_without_runs_says_so_and_how_to_fill_it(store: Made, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(store.uri.removeprefix("sqlite:///"), database)
    client = open_store(f"sqlite:///{database}")
    for experiment in client.search_experiments():
        client.delete_experiment(experiment.experiment_id)
    client.delete_registered_model("story-writer")
    page = asyncio.run(handlers.opened(DirectClient(f"sqlite:///{database}"), {}))
    assert (page.curves, page.note) == (None, NOTHING)
    assert "\n" not in NOTHING
    assert "`story train`" in NOTHING


def test_a_store_that_is_not_there_says_so_and_is_not_made(tmp_path: Path) -> None:
    client = DirectClient(f"sqlite:///{tmp_path}/mlflow.db")
    page = asyncio.run(handlers.opened(client, {}))
    assert page.curves is None
    assert page.note.endswith("`story train` fills it.")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_while_the_page_is_open_costs_a_line_each(tmp_path: Path) -> None:
    client = DirectClient(f"sqlite:///{tmp_path}/mlflow.db")
    drawn = asyncio.run(handlers.draw(client, ["a"], ["held-out"]))
    assert drawn["chosen"] == ["a"], "the choice stays, for another try"
    assert "`story train`" in drawn["note"]
    assert "`story train`" in asyncio.run(handlers.samples(client, "a"))["note"]


def test_each_color_of_a_curve_has_a_contrast_of_3_on_its_paper_and_there_is_one_for_each_run() -> None:
    """WCAG 2.2, 1.4.11, with the relative luminance of its glossary."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    found = re.findall(r"--curve-\d: (#\w{6});", theme.asset("experiments.css"))
    for colors, paper in zip(
        (found[:MOST_CHOSEN], found[MOST_CHOSEN:]), theme.LIGHT_AND_DARK["body_background_fill"], strict=True
    ):
        assert len(set(colors)) == MOST_CHOSEN
        for color in colors:
            low, high = sorted((luminance(color), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 3, (color, paper)
