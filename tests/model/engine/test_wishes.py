"""Wishes reach the network as a header before the story, and only a network that knows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.errors import InputError
from model.generation import GenerationRequest
from model.wishes import Wishes
from tests.model.engines import TOKENIZER, engine, request, runtime

WISHES = Wishes(words=("fox", "Ember"), ending="sad")
HEADER = TOKENIZER.encode(WISHES.header())


def test_a_story_with_wishes_is_the_one_behind_its_header() -> None:
    text = request("Grüß dich", seed=4, wishes=WISHES, echo=True)
    with engine(wishes=True) as e:
        wished = e.submit(text)
        found, expected = (
            wished.wait(),
            e.submit(replace(text, prompt=(*HEADER, *TOKENIZER.encode("Grüß dich")), wishes=Wishes())),
        )
        assert found.text == expected.wait().text
        assert wished.tokens == expected.tokens
        assert found.usage.prompt_tokens == expected.completion.usage.prompt_tokens
        assert found.prompt is not None
        assert found.prompt.text == "Grüß dich"
        assert e.submit(replace(text, wishes=Wishes())).wait().text != found.text


def test_a_network_that_knows_no_wishes_refuses_them() -> None:
    with engine(runtime()) as e, pytest.raises(InputError, match="wishes cannot be met: this model was not trained"):
        e.submit(request(wishes=WISHES))


def test_a_scored_prompt_has_no_wishes() -> None:
    with pytest.raises(InputError, match="wishes cannot be had together with log-probabilities of the prompt"):
        GenerationRequest(prompt="Once", wishes=WISHES, prompt_logprobs=1)
