"""The fixed prompts, and stories that depend on prompt and seed alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.quality.generated import (
    Prompt,
    UnfinishedStoryError,
    dice_seed,
    load_prompts,
    prompts_digest,
    write_stories,
)
from experiments.quality.names import holds
from model.errors import DataError
from tests.model import engines


def test_each_prompt_names_two_children() -> None:
    prompts = load_prompts()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 64
    assert all(len(prompt.names) == 2 for prompt in prompts)
    assert all(holds(prompt.text, name) for prompt in prompts for name in prompt.names)


def test_the_prompts_are_those_that_figures_in_the_log_were_measured_on() -> None:
    """Whoever changes a prompt changes this digest too, and thinks of the figures that then compare no more."""
    assert prompts_digest(load_prompts())[:12] == "639cce02356c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "A dog."}\n', "line 1: needs"),
        ('{"prompt": "A dog.", "names": []}\n{"prompt": "A dog.", "names": ["Lily"]}\n', "line 2: needs"),
        ('{"prompt": "A dog.", "names": "A"}\n', "line 1: needs"),
        ("[]\n", "line 1: needs"),
        ("A dog.\n", "line 1: needs"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"prompts\.jsonl.*{message}"):
        load_prompts(path)
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        load_prompts(tmp_path / "none.jsonl")


def test_no_two_stories_of_an_evaluation_share_their_dice() -> None:
    seeds = [dice_seed(seed, number, 64) for seed in range(3) for number in range(64)]
    assert sorted(seeds) == list(range(192))


def test_stories_come_by_seed_and_prompt_and_each_as_if_it_were_alone() -> None:
    prompts = load_prompts()[:3]
    heard: list[int] = []
    with engines.engine(slots=2) as engine:
        stories = write_stories(engine, prompts, [0, 5], heard.append)
        later = write_stories(engine, prompts, [5])
    assert [(story.seed, story.number) for story in stories] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (5, 0),
        (5, 1),
        (5, 2),
    ]
    assert all(story.prompt == prompts[story.number] for story in stories)
    assert stories[3:] == later
    assert len({story.text for story in stories}) == 6
    assert sum(heard) == 6


def test_a_model_that_fails_gives_no_figures() -> None:
    network = engines.runtime()
    network.fail_next = RuntimeError("out of memory")
    with (
        engines.engine(network) as engine,
        pytest.raises(UnfinishedStoryError, match="the story of prompt 1 was not"),
    ):
        write_stories(engine, [Prompt("The dog", ())], [0])
