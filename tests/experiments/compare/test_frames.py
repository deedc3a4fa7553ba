"""The frames hold what the runs reported, and evidence only of the very artifact."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.common.thresholds import METRICS
from experiments.compare.choose import choose
from experiments.compare.frames import CURVE_COLUMNS, QUALITY, SPEED, curves, differences, notes, table
from tests.experiments.compare.conftest import Place
from training.tracking.store import open_experiment, open_store


def test_curves_are_the_reported_points_over_steps_tokens_and_minutes(place: Place) -> None:
    frame = curves(place.uri, choose(place.uri, ["fox"]))
    assert tuple(frame.columns) == CURVE_COLUMNS
    val = frame[frame["metric"] == "val/bits_per_byte"]
    assert val[["step", "tokens", "value"]].values.tolist() == [[4, 4 * 512, 1.25], [8, 8 * 512, 1.125]]
    train = frame[frame["metric"] == "train/loss"]
    assert train["value"].tolist() == [2 + 1 / number for number in range(1, 9)]
    assert np.allclose(train["minutes"], np.arange(1, 9) * 0.5 / 60)


def test_a_step_done_again_counts_as_it_was_the_last_time(place: Place) -> None:
    client = open_store(place.uri)
    run_id = client.create_run(open_experiment(client, place.uri, "story-training")).info.run_id
    try:
        for time, (step, value) in enumerate([(1, 3.0), (2, 2.5), (3, 9.0), (3, 2.0)]):
            client.log_metric(run_id, "train/loss", value, timestamp=1000 + time, step=step)
        frame = curves(place.uri, choose(place.uri, [run_id]))
    finally:
        client.delete_run(run_id)
    assert frame[["step", "value"]].values.tolist() == [[1, 3.0], [2, 2.5], [3, 2.0]]
    assert frame["tokens"].isna().all(), "a run without that axis has no place on it"


def test_the_table_holds_the_run_and_the_evidence_of_its_artifact(place: Place) -> None:
    frame = table(place.uri, choose(place.uri, ["fox", place.runs["other twin"]]))
    fox, twin = frame.loc["fox"], frame.loc["twin"]
    assert (fox["best_bits_per_byte"], fox["tokens"], fox["parameters"]) == (1.125, 8 * 512, 5_200_000)
    assert fox["train_tokens_per_second"] == pytest.approx(8 * 512 / 4.0)
    assert (fox["version"], fox["tokens_per_second"]) == ("1, challenger", 900.0), "a failed run is no evidence"
    assert (fox["bits_per_byte"], fox["written/ended"]) == (0.61, 0.95)
    assert fox["held_out"] == "48 (23e8e5da)"
    assert twin["best_bits_per_byte"] == pytest.approx(1.25)
    assert twin[["bits_per_byte", "tokens_per_second"]].isna().all(), "nothing was measured of it"


def test_only_what_differs_is_listed(place: Place) -> None:
    chosen = choose(place.uri, ["fox", place.runs["twin"], place.runs["other twin"]])
    frame = differences(chosen)
    assert dict(zip(frame.index, frame.values.tolist(), strict=True)) == {
        "model.pattern": ["RRA", "RRA", ""],
        "model.width": ["64", "64", "96"],
        "seed": ["0", "1", "0"],
    }
    assert differences(chosen[:1]).empty


def test_what_cannot_be_compared_is_said(place: Place) -> None:
    figures = table(place.uri, choose(place.uri, ["fox"]))
    unlike = differences(choose(place.uri))
    assert notes(figures, unlike) == []
    unlike.loc["data.digest"] = unlike.loc["machine.cpu"] = ["a", "b", "c"]
    output = notes(figures, unlike)
    assert ["different data" in output[0], "by tokens, not by minutes" in output[1], len(output)] == [True, True, 2]


def test_its_figures_are_among_those_that_the_project_measures() -> None:
    bounds = {"bits_per_byte_low", "bits_per_byte_high"}
    assert {name for name in (*QUALITY, *SPEED) if name not in METRICS} == bounds
    assert {METRICS[name].scope for name in QUALITY if name not in bounds} == {"quality"}
    assert {METRICS[name].scope for name in SPEED} == {"benchmark"}
