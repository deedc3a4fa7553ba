"""Links: what goes in comes out, and whatever a stranger writes into one does no harm."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.form import FIELDS, LONGEST, MAX_QUERY, MAX_SEED, Form, check_field, decode_link, encode_link
from model.errors import InputError

VERSION = "0123456789abcdef" * 4
TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
GOOD = st.builds(
    Form,
    prompt=TEXT,
    max_tokens=st.integers(1, LONGEST),
    temperature=st.integers(0, 40).map(lambda n: n / 20),
    top_p=st.integers(1, 100).map(lambda n: n / 100),
    top_k=st.integers(0, 1_000_000),
    min_p=st.integers(0, 100).map(lambda n: n / 100),
    repetition_penalty=st.integers(100, 200).map(lambda n: n / 100),
    seed=st.integers(0, MAX_SEED),
)


@given(form=GOOD)
def test_a_link_reopens_the_same_form(form: Form) -> None:
    values, notes = decode_link(dict(parse_qsl(encode_link(form, VERSION), keep_blank_values=True)), VERSION)
    assert Form(**values) == form
    assert notes == []


@given(form=GOOD)
def test_another_parser_of_query_strings_sees_the_same_words(form: Form) -> None:
    seen = parse_qs(encode_link(form, VERSION), keep_blank_values=True, strict_parsing=True)
    assert seen["prompt"] == [form.prompt]
    assert float(seen["temperature"][0]) == form.temperature
    assert seen["model"] == [VERSION[:12]]
    assert set(seen) == {*FIELDS, "model"}


@given(query=st.dictionaries(st.one_of(st.sampled_from([*FIELDS, "model"]), TEXT), TEXT))
def test_whatever_a_link_holds_only_usable_values_come_out(query: dict[str, str]) -> None:
    values, notes = decode_link(query, VERSION)
    assert all(check_field(name, value) is None for name, value in values.items())
    assert set(values) <= set(query)
    refused = [name for name in FIELDS if name in query and name not in values]
    assert len(notes) >= len(refused)
    assert all(len(note) < 250 for note in notes)


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1e999", "", " ", "0x10", "1_0", "٣", "9" * 5000, "2.5", "-1", "<script>", "None"]
)
def test_what_is_no_usable_temperature_is_left_out_and_reported(text: str) -> None:
    values, notes = decode_link({"temperature": text, "prompt": "Hello"}, VERSION)
    assert values == {"prompt": "Hello"}
    assert len(notes) == 1
    assert "Temperature" in notes[0]


@pytest.mark.parametrize("name", ["seed", "max_tokens", "top_k"])
def test_half_a_token_or_seed_is_refused(name: str) -> None:
    assert decode_link({name: "1.5"}, VERSION)[0] == {}
    assert decode_link({name: "15"}, VERSION)[0] == {name: 15}


def test_names_that_are_not_ours_are_left_alone() -> None:
    assert decode_link({"__theme": "dark", "model": "x", "view": "api"}, VERSION) == decode_link({}, VERSION)


def test_a_link_of_another_model_version_says_so_and_opens_all_the_same() -> None:
    query: dict[str, Any] = dict(parse_qsl(encode_link(Form(prompt="Hello", seed=4), "f" * 64)))
    values, notes = decode_link(query, VERSION)
    assert values["seed"] == 4
    assert notes == ["This link was made with another version of the model, so the story will differ."]


def test_a_prompt_too_long_for_an_address_is_an_error_that_names_it() -> None:
    fits = encode_link(Form(prompt="a" * 15_000), VERSION)
    assert len(fits) <= MAX_QUERY
    with pytest.raises(InputError, match="prompt is too long to travel in a link"):
        encode_link(Form(prompt="é" * 15_000), VERSION)
