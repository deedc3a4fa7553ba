"""How often wishes are met: each kind by itself, on prompts that the evaluation wishes with."""

from __future__ import annotations

from collections import Counter

from experiments.quality.generation import WISH_PROMPTS, WISHED, Prompt, WrittenStory, load_prompts, measure_wishes
from model.wishes import Wishes

SAD, HAPPY = "She was sad and cried.", "They were happy and laughed."


def figures(prompt: Prompt, text: str) -> dict[str, float | None]:
    (found,) = measure_wishes([WrittenStory(prompt, 0, 0, text, 9, True)]).figures
    return {name: value for name, value in found.items() if value is not None}


def test_a_story_counts_for_the_wishes_that_it_had() -> None:
    words = Prompt("A fox ran.", wishes=Wishes(words=("fox", "cake")))
    assert figures(words, " The fox ate a cake.") == {"words": 1}
    assert figures(words, " He ate a fish.") == {"words": 0}
    for ending in ("sad", "happy"):
        wished = Prompt("Once.", wishes=Wishes(ending=ending))
        assert figures(wished, SAD) == {ending: ending == "sad"}
        assert figures(wished, HAPPY) == {ending: ending == "happy"}
    assert figures(Prompt('"Hi," said Tom.', wishes=Wishes(dialogue=False, length="short")), " He ran.") == {
        "dialogue": 0,
        "length": 1,
    }


def test_the_prompts_have_enough_of_each_wish() -> None:
    prompts = load_prompts(WISH_PROMPTS)
    kinds = Counter(name for prompt in prompts for name in prompt.wishes.met(""))
    assert kinds == {"words": 24, "length": 24, "dialogue": 24, "ending": 36}
    assert len({(prompt.text, prompt.wishes) for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert not any(Wishes(words=(word,)).met(prompt.text)["words"] for word in prompt.wishes.words)
    measured = measure_wishes([WrittenStory(prompt, n, 0, "", 0, False) for n, prompt in enumerate(prompts)])
    assert {name: estimate.n for name, estimate in measured.estimates().items()} == dict(
        zip(WISHED, (24, 24, 24, 24, 12), strict=True)
    )
