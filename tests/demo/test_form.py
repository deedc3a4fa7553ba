"""The form: what a field may hold, judged field by field and, independently, as a whole request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.form import CHOICES, FIELDS, LABELS, LONGEST, MAX_SEED, WISHES, Form, check_field
from model.errors import InputError
from model.generation import GenerationRequest, new_seed
from model.wishes import Wishes

SMALL = st.one_of(st.integers(-3, 3), st.floats(-1, 3))
NUMBERS = st.one_of(SMALL, st.none(), st.booleans(), st.integers(), st.floats())
FORMS = st.builds(
    Form,
    prompt=st.text(st.characters(codec="utf-8"), max_size=50),
    **{name: NUMBERS for name in FIELDS if name not in ("prompt", *WISHES)},
    words=st.sampled_from(["", "cake, Ember", "3", 3]),
    **{name: st.sampled_from([*allowed, "other", None]) for name, allowed in CHOICES.items()},
)


def test_an_untouched_form_asks_for_what_the_model_would_do_anyway() -> None:
    assert Form().request() == GenerationRequest(prompt="")


@given(form=FORMS)
def test_a_form_without_problems_is_exactly_one_that_can_be_sent(form: Form) -> None:
    if problems := form.problems():
        with pytest.raises(InputError) as caught:
            form.request()
        assert LABELS[caught.value.param] in problems
    else:
        assert form.request().sampling.seed == form.seed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 2.5, "Temperature must be between 0 and 2, got 2.5"),
        ("top_p", 0, "Top-p must be above 0 and at most 1, got 0"),
        ("seed", -5, f"Seed must be a whole number between 0 and {MAX_SEED}, got -5"),
        ("top_k", None, "Top-k is empty; it needs a number"),
        ("max_tokens", LONGEST + 1, f"Length must be a whole number between 1 and {LONGEST}, got 1025"),
        ("words", "cake, 3", "Words must be single words of at most 40 letters each, got '3'"),
        ("story_length", "huge", "Story length must be one of any, short, medium, long, got 'huge'"),
        ("dialogue", True, "Dialogue must be one of any, with, without, got True"),
        ("prompt", "x" * 20_001, "Prompt must have at most 20000 characters, got 20001"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(name: str, value: Any, message: str) -> None:
    problem = check_field(name, value)
    assert problem is not None
    assert problem.param == name
    assert Form(**{name: value}).problems() == {LABELS[name]: message}


def test_what_is_wished_on_the_page_is_what_the_model_is_told() -> None:
    form = Form(words=" cake,Ember  dragon", story_length="short", dialogue="without", ending="sad")
    assert form.request().wishes == Wishes(
        words=("cake", "Ember", "dragon"), length="short", dialogue=False, ending="sad"
    )
    assert Form(dialogue="with").request().wishes == Wishes(dialogue=True)


def test_all_bad_fields_are_reported_at_once() -> None:
    assert set(Form(temperature=-1, top_k=-1, seed=-1).problems()) == {"Temperature", "Top-k", "Seed"}


def test_the_largest_seed_survives_a_browser_and_the_next_one_would_not() -> None:
    assert int(float(json.dumps(MAX_SEED))) == MAX_SEED
    assert int(float(json.dumps(MAX_SEED + 2))) != MAX_SEED + 2
    assert check_field("seed", MAX_SEED) is None
    assert check_field("seed", MAX_SEED + 1) is not None


def test_new_seeds_differ_and_the_field_takes_them_exactly() -> None:
    seeds = [new_seed() for _ in range(50)]
    assert len(set(seeds)) > 40
    assert all(check_field("seed", seed) is None and int(float(seed)) == seed for seed in seeds)


def test_going_on_from_a_text_leaves_the_prompt_field_aside() -> None:
    form = Form(prompt="in the field", seed=3)
    assert form.request("on the page").prompt == "on the page"
    assert form.request("on the page").sampling == form.request().sampling


def test_an_empty_seed_is_drawn_for_each_story_and_a_given_one_is_kept() -> None:
    form = Form(seed=None)
    assert form.problems() == {}
    assert len({form.request().sampling.seed for _ in range(5)}) > 1
    assert {Form(seed=3).request().sampling.seed for _ in range(3)} == {3}
