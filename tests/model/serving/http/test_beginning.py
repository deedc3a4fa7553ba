"""What of a conversation becomes the beginning of a story."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.serving.http.chat import MAX_INSTRUCTION, Turn, beginning_of, prompt_of

INSTRUCTIONS = {
    "Write a story about a fox named Ember": "Once upon a time, there was a fox named Ember.",
    "write a story about a fox named Ember.": "Once upon a time, there was a fox named Ember.",
    "Please write me a short, funny bedtime story about an owl!": "Once upon a time, there was an owl.",
    "Could you tell us a story about two brothers, please?": "Once upon a time, there were two brothers.",
    "Tell me a story for my little daughter about a few mice": "Once upon a time, there were a few mice.",
    "I'd like a story about a dragon": "Once upon a time, there was a dragon.",
    "I would like you to write a children\u2019s story about a dragon": "Once upon a time, there was a dragon.",
    "Write A Story About A Fox": "Once upon a time, there was a Fox.",
    "Write a story about a cat in under 100 words, please.": "Once upon a time, there was a cat.",
    "Write a short story (100 words) about a cat for kids": "Once upon a time, there was a cat.",
    "Write a 3-sentence story about a robot": "Once upon a time, there was a robot.",
    "Create a fairy tale with a dragon called Zog": "Once upon a time, there was a dragon called Zog.",
    "A short story about a fox": "Once upon a time, there was a fox.",
    "Write about a fox": "Once upon a time, there was a fox.",
    "Tell me a story about Lily and her cat.": "Once upon a time, Lily and her cat",
    "Tell me a story about Tom, Mia and Ben": "Once upon a time, Tom, Mia and Ben",
    "Write a story about Ember the fox": "Once upon a time, Ember the fox",
    "Write a story about Mr. Fox. His wife is Anna. Make it funny.": "This is a story about Mr. Fox. His wife is Anna.",
    "Write a story about a fox. His name is Ember. Use simple words.": (
        "Once upon a time, there was a fox. His name is Ember."
    ),
    "Write about the sea": "This is a story about the sea.",
    "Write a story about friendship": "This is a story about friendship.",
    "Write a story with a happy ending": "This is a story with a happy ending.",
    "Write a story in which a dog finds a bone.": "This is a story in which a dog finds a bone.",
    "Write a story called The Brave Fox": "This is a story called The Brave Fox.",
    "Write a story": "Once upon a time",
    "Tell me a story, please!": "Once upon a time",
    "Write a story for my daughter": "Once upon a time",
    'Write a story that starts with "A fox could not sleep."': "A fox could not sleep.",
    "Write a story starting with: A fox could not sleep.": "A fox could not sleep.",
}
BEGINNINGS = [
    "A fox could not sleep.",
    "Once upon a time, there was a story about a fox",
    "Once upon a time, there was a fox named Ember.",
    "A boy told a story about a fox",
    "A story about a fox hung on the wall.",
    "The story of the fox began in the woods.",
    'Tell me a story about a fox," said the child.',
    "Tell me a story, said the fox.",
    "Mia wanted to write a story about a fox.",
    "What is two plus two?",
    "Schreib eine Geschichte über einen Fuchs",
    "Write a story about a fox " + "and a bear " * 50,
]


@pytest.mark.parametrize(("message", "beginning"), INSTRUCTIONS.items())
def test_an_instruction_becomes_a_beginning_that_the_response_shows(message: str, beginning: str) -> None:
    assert beginning_of(message) == (beginning, beginning)


@pytest.mark.parametrize("text", BEGINNINGS)
def test_any_other_text_is_the_beginning_itself(text: str) -> None:
    assert beginning_of(f" {text}\n") == (text.strip(), "")


@pytest.mark.parametrize(
    "message",
    [
        "Continue this story: A fox could not sleep.",
        'Please continue the following story:\n"A fox could not sleep."',
        "Finish the story: A fox could not sleep.",
    ],
)
def test_a_story_to_be_continued_is_what_follows_the_colon(message: str) -> None:
    assert beginning_of(message) == ("A fox could not sleep.", "")


NAMES = st.from_regex(r"[A-Z][a-z]{1,9}", fullmatch=True)
ANIMALS = st.sampled_from(["fox", "brave little girl", "old robot", "dragon with a hat", "boy who was afraid"])
VERBS = st.sampled_from(["Write", "Please write", "Tell me", "Could you tell us", "I want you to write", "Make up"])
KINDS = st.sampled_from(["a", "a short", "another", "a sweet, funny", "a bedtime", "one very short"])
ENDS = st.sampled_from(["", ".", "!", " please", ", thanks.", " in 100 words", " for kids."])


@given(verb=VERBS, kind=KINDS, animal=ANIMALS, name=NAMES, end=ENDS)
def test_a_named_hero_keeps_kind_and_name(verb: str, kind: str, animal: str, name: str, end: str) -> None:
    article = "an" if animal[0] in "aeiou" else "a"
    made, lead = beginning_of(f"{verb} {kind} story about {article} {animal} named {name}{end}")
    assert made == lead == f"Once upon a time, there was {article} {animal} named {name}."


WORDS = """write tell me a an the story tale about of with Ember fox and her named for kids please continue : . , ? " '
( ) \u201c \u201d \u2019s in 100 words starts which where"""
TEXTS = st.text(max_size=80) | st.lists(st.sampled_from(WORDS.split()), max_size=25).map(" ".join)


@given(TEXTS)
def test_a_beginning_is_the_text_or_shown_whole_and_is_no_instruction_itself(text: str) -> None:
    made, lead = beginning_of(text)
    assert lead in ("", made)
    assert made == made.strip()
    if not lead:
        assert made in text
    elif made.startswith(("Once upon a time", "This is a story")):
        assert beginning_of(made) == (made, "")


@given(st.text(min_size=MAX_INSTRUCTION + 1, max_size=MAX_INSTRUCTION + 50))
def test_a_long_text_is_a_beginning(text: str) -> None:
    made, lead = beginning_of(f"Write a story about {text}")
    assert (made, lead) == (f"Write a story about {text}".strip(), "")


FOX = "A fox could not sleep."
MADE = "Once upon a time, there was a fox."


@pytest.mark.parametrize(
    ("turns", "prompt", "lead"),
    [
        ([("user", FOX)], FOX, ""),
        ([("system", "You are a pirate."), ("developer", "Be brief."), ("user", FOX)], FOX, ""),
        ([("user", "A bear."), ("assistant", " It ate."), ("user", FOX)], FOX, ""),
        ([("user", "Write a story about a fox"), ("assistant", "")], MADE, MADE),
        ([("user", FOX), ("assistant", " He sat")], f"{FOX} He sat", ""),
        ([("user", FOX), ("assistant", "He sat")], f"{FOX} He sat", ""),
        ([("user", "Once upon a ti"), ("assistant", "me")], "Once upon a time", ""),
        ([("user", "Write a story about a fox"), ("assistant", f"{MADE} He sat")], f"{MADE} He sat", ""),
        ([("user", FOX), ("assistant", " He sat."), ("user", "Go on, please!")], f"{FOX} He sat.", ""),
        (
            [
                *[("user", "Write a story"), ("assistant", "A dog ran."), ("user", "continue")],
                *[("assistant", "It fell."), ("user", "What happened next?")],
            ],
            "A dog ran. It fell.",
            "",
        ),
        ([("assistant", FOX)], FOX, ""),
        ([("user", "Continue.")], "Continue.", ""),
        ([("user", "")], "", ""),
    ],
)
def test_a_conversation_becomes_one_prompt(turns: list[tuple[str, str]], prompt: str, lead: str) -> None:
    assert prompt_of([Turn(role, text) for role, text in turns]) == (prompt, lead)


CONVERSATIONS = st.lists(
    st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), TEXTS | st.just("Continue")),
    min_size=1,
    max_size=6,
).filter(lambda turns: any(turn.role != "system" for turn in turns))


@given(CONVERSATIONS)
def test_an_assistant_at_the_end_is_continued_and_a_system_message_is_never_text(turns: list[Turn]) -> None:
    prompt, lead = prompt_of(turns)
    assert prompt.startswith(lead)
    if turns[-1].role == "assistant":
        assert prompt.endswith(turns[-1].text)
    assert prompt_of([Turn("system", "Sprich wie ein Pirat"), *turns]) == (prompt, lead)
    assert prompt_of([turn for turn in turns if turn.role != "system"]) == (prompt, lead)
