"""Names that mean one thing, and the errors for those that mean none or several."""

from __future__ import annotations

import pytest

from experiments.compare.choose import choose
from model.errors import InputError
from tests.experiments.compare.conftest import Place


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
