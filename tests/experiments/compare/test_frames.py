"""The frames hold what the runs reported, and evidence only of the very artifact.

Names mean one thing, and those that mean none or several are errors.
"""

from __future__ import annotations

import numpy as np
import pytest

from experiments.common.thresholds import METRICS
from experiments.compare.frames import CURVE_COLUMNS, QUALITY, SPEED, choose, curves, differences, notes, table
from model.errors import InputError
from tests.experiments.compare.conftest import Place
from training.tracking.store import open_experiment, open_store


def test_without_names_the_newest_runs_are_taken(place: Place) -> None:
    assert [subject.run_id for subject in choose(place.uri)] == list(reversed(place.runs.values()))
    assert [subject.run_id for subject in choose(place.uri, newest=1)] == [place.runs["other twin"]]


def test_runs_of_one_name_get_labels_that_distinguish_them(place: Place) -> None:
    labels = [subject.label for subject in choose(place.uri)]
    assert labels == [f"twin {place.runs['other twin'][:8]}", f"twin {place.runs['twin'][:8]}", "fox"]


@pytest.mark.parametrize("how", ["id", "prefix", "name"])
def test_a_run_is_found_by_id_prefix_and_name_and_knows_its_version(how: str, place: Place) -> None:
    run_id = place.runs["fox"]
    (subject,) = choose(place.uri, [{"id": run_id, "prefix": run_id[:8], "name": "fox"}[how]])
    assert subject.version is not None
    assert (subject.label, subject.run_id, subject.version.digest) == ("fox", run_id, place.version.digest)


@pytest.mark.parametrize(
    "name", ["1", "challenger", "digest", "models:/story-writer/1", "models:/story-writer@challenger"]
)
def test_a_version_is_found_by_number_alias_digest_and_address(name: str, place: Place) -> None:
    (subject,) = choose(place.uri, [place.version.digest[:10] if name == "digest" else name])
    assert subject.label == "version 1 (challenger)"
    assert subject.run_id == place.runs["fox"]


def test_what_is_named_twice_is_taken_once_and_the_order_is_that_of_the_names(place: Place) -> None:
    twin = place.runs["twin"]
    chosen = choose(place.uri, [twin, "fox", "1", twin[:10]])
    assert [subject.run_id for subject in chosen] == [twin, place.runs["fox"]]


def test_an_unknown_name_is_answered_with_what_there_is(place: Place) -> None:
    with pytest.raises(InputError, match=r"got 'fix'; runs: twin \(.*fox \(.*; versions: 1 = challenger$"):
        choose(place.uri, ["fix"])


def test_a_name_of_two_runs_is_answered_with_their_ids(place: Place) -> None:
    with pytest.raises(InputError, match="'twin' may mean") as caught:
        choose(place.uri, ["twin"])
    assert all(place.runs[name][:8] in str(caught.value) for name in ("twin", "other twin"))


def test_three_digits_of_an_id_are_no_name(place: Place) -> None:
    with pytest.raises(InputError, match="must be a run or a registered version"):
        choose(place.uri, [place.runs["fox"][:3]])


def test_an_empty_store_says_how_to_make_a_run(tracking_uri: str) -> None:
    with pytest.raises(InputError, match="`story train` makes one"):
        choose(tracking_uri)


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
