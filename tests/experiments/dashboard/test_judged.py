"""Versions, verdicts and benchmarks as the page shows them, against those who made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from experiments.benchmark.evidence import load_benchmark_evidence
from experiments.dashboard.judged import FIGURES, benchmark_rows, version_rows
from experiments.dashboard.records import Overview, as_plain
from experiments.dashboard.runs import run_rows
from experiments.registry.versions import versions
from tests.experiments.dashboard.made import Made, made
from training.tracking.store import open_store


@pytest.fixture(scope="module")
def store() -> Made:
    return made()


def test_each_version_has_its_aliases_and_the_newest_verdict_on_it(store: Made) -> None:
    rows = version_rows(open_store(store.uri, read_only=True), {})
    known = versions(store.uri)
    assert [(row.number, row.digest, row.aliases) for row in rows] == [
        (each.number, each.digest, each.aliases) for each in known
    ]
    assert [row.aliases for row in rows] == [("challenger",), ("champion",)]
    assert rows[0].decision is None, "the challenger was never judged"
    decision = rows[1].decision
    assert decision is not None
    assert (decision.verdict, decision.champion) == ("fail", store.decision.champion or "")


def test_every_check_is_told_with_all_that_it_stands_on(store: Made) -> None:
    (row,) = (row for row in version_rows(open_store(store.uri, read_only=True), {}) if row.number == 1)
    assert row.decision is not None
    told = [as_plain(check) for check in row.decision.checks]
    decided = [check.as_dict() for check in store.decision.checks]
    assert told == [{name: check[name] for name in told[0]} for check in decided]
    assert {check.verdict for check in row.decision.checks} == {"pass", "fail", "undecided"}


def test_a_decision_is_read_once_and_one_whose_file_is_gone_keeps_its_verdict(
    store: Made, tmp_path: Path
) -> None:
    client = open_store(store.uri, read_only=True)
    known: dict[str, object] = {}
    before = version_rows(client, known)  # type: ignore[arg-type]
    assert len(known) == 1
    assert version_rows(client, known)[1].decision is before[1].decision  # type: ignore[arg-type]
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    writing = open_store(f"sqlite:///{tmp_path}/mlflow.db")
    gate = writing.get_experiment_by_name("story-gate")
    assert gate is not None
    run = writing.create_run(
        gate.experiment_id,
        tags={"artifact.digest": before[1].digest, "gate": "undecided", "champion.digest": ""},
    )
    writing.set_terminated(run.info.run_id)
    decision = version_rows(writing, {})[1].decision
    assert decision is not None
    assert (decision.verdict, decision.checks) == ("undecided", ())
    assert decision.notes == ("the checks of this decision cannot be read",)


def test_a_benchmark_is_told_with_the_figures_of_its_rows(store: Made) -> None:
    (row,) = benchmark_rows(open_store(store.uri, read_only=True))
    evidence = load_benchmark_evidence(store.uri, row.digest)
    assert evidence is not None
    assert row.id == evidence.run_id
    assert row.target == "local"
    expected = {name: evidence.figures[name].value for name in FIGURES if name in evidence.figures}
    assert row.figures == pytest.approx(expected)
    assert {"tokens_per_second", "ttft_p50", "success_rate"} <= set(expected)


def test_nothing_that_is_handed_on_names_a_folder_an_address_or_a_person(store: Made) -> None:
    client = open_store(store.uri, read_only=True)
    runs, more = run_rows(client)
    seen = Overview(
        runs=tuple(runs), benchmarks=tuple(benchmark_rows(client)), versions=tuple(version_rows(client, {})),
        more=more,
    )  # fmt: skip
    text = json.dumps(as_plain(seen))
    assert Overview.of(json.loads(text)) == seen
    for private in (str(Path.home()), str(Path(store.uri).parent), "sqlite:", "mlflow.db", "owner", "file:"):
        assert private not in text
