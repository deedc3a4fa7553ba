"""Turns a conversation into the prompt of a story.

The model continues stories, and follows no instructions. The rules:

1. System and developer messages do not become text of the story.
2. The last user message is the story's beginning, without space around it.
3. If that message is an instruction, a beginning is made of its subject, and the response begins with it: "Write a
   story about a fox named Ember" becomes "Once upon a time, there was a fox named Ember.".
4. "Continue this story: …" stands for the text after it.
5. If the last message is the assistant's, or the user only asks it to go on, the assistant's text is continued; its
   beginning, if that was the user's own text, is put before it.

Only English instructions are recognised, as the model writes English; any other text is a beginning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_INSTRUCTION = 400
"""Characters; a longer text is a beginning."""
NOTHING = "Once upon a time"
"""The beginning for an instruction without a subject."""


class Turn(NamedTuple):
    """A message of a conversation."""

    role: str
    text: str


def prompt_of(turns: Sequence[Turn]) -> tuple[str, str]:
    """Return the story's prompt, and what of it the client does not have yet.

    `turns` hold one of the user or of the assistant at least.
    """
    story: list[str] = []  # the assistant's texts since the message that asked for the story, last one first
    for role, text in reversed(turns):
        if role == "assistant":
            story.append(text)
        elif role == "user" and not (_GO_ON.fullmatch(text.strip()) and _answers(turns)):
            prompt, lead = beginning_of(text)
            if not any(story):
                return prompt, lead
            return _join([*([] if lead else [prompt]), *reversed(story)]), ""
    return _join(story[::-1]), ""


def _answers(turns: Sequence[Turn]) -> bool:
    """Whether the assistant has written anything that could be continued."""
    return any(role == "assistant" and text for role, text in turns)


def _join(texts: Sequence[str]) -> str:
    """Join what are parts of one story; a space is put between two sentences where a client has removed it."""
    story = ""
    for text in texts:
        story += " " + text if _SENTENCE_END.search(story) and text[:1].isalnum() else text
    return story


def beginning_of(message: str) -> tuple[str, str]:
    """Return the prompt of a user's message, and what of it the response has to begin with."""
    text = message.strip()
    asked = _ASIDE.sub("", text)
    if found := _CONTINUE.fullmatch(text):
        return _unquoted(found["text"]), ""
    if len(text) > MAX_INSTRUCTION:
        return text, ""
    if found := _STARTING_WITH.fullmatch(asked):
        made = _unquoted(found["text"] or found["quoted"])
    elif found := _INSTRUCTION.fullmatch(asked) or _ABOUT.fullmatch(asked) or _TITLE.fullmatch(asked):
        made = _beginning(**found.groupdict())
    else:
        made = ""
    return made or text, made


def _beginning(link: str | None = None, subject: str | None = None) -> str:
    """Return the beginning of a story with this subject; empty where it is no subject after all."""
    if link is None or subject is None:
        return NOTHING
    subject, *more = _SENTENCES.split(subject.strip())
    shorter = ""
    while shorter != subject:
        shorter, subject = subject, _TRAILING.sub("", subject)
    if subject.count('"') % 2 or subject.count("“") != subject.count("”"):
        return ""  # speech that began before: the text is a story's own
    if not re.search(r"\w", subject):
        return NOTHING
    rest = "".join(f" {sentence}" for sentence in more if not _WISH.match(sentence))
    link = " ".join(link.lower().split())
    someone = link not in _NO_PERSON or (link == "with" and re.search(r"\b(?:named|called)\b", subject))
    kind = _ARTICLE.match(subject) if someone else None
    if kind:
        verb = "were" if kind["many"] else "was"
        return f"Once upon a time, there {verb} {kind[0].lower()}{subject[kind.end() :]}.{rest}"
    if someone and not rest and _NAMES.fullmatch(subject):
        return f"Once upon a time, {subject}"
    return f"This is a story {link} {subject}.{rest}"


def _unquoted(text: str) -> str:
    text = text.strip()
    for opening, closing in ('""', "“”", "''", "\u2018\u2019", "«»"):
        if len(text) > 1 and text[0] == opening and text[-1] == closing and closing not in text[1:-1]:
            return text[1:-1].strip()
    return text


_POLITE = (
    r"(?:(?:please|hi|hello|hey|ok|okay|now)\b[,.!]?\s+|(?:can|could|would|will)\s+you\s+"
    r"|i(?:\s+would|'d|\u2019d)?\s+(?:like|want|need)\s+(?:you\s+)?to\s+|let's\s+)*"
)
_VERB = (
    r"(?:(?:write|tell|give|make(?:\s+up)?|create|generate|compose|invent|read|craft|start|begin|hear|have"
    r"|i(?:\s+would|'d|\u2019d)?\s+(?:like|want|need))\s+)"
    r"(?:(?:me|us|him|her|them|my\s+\w+)\s+)?"
)
_STORY = r"(?:story|tale|fairy\s?tale|fable|poem|rhyme)"
_AUDIENCE = r"(?:\s+(?:for|to)\s+(?:[\w'\u2019-]+\s+){0,4}?[\w'\u2019-]+)?"
_LINK = (
    r"(?P<link>about|of|featuring|starring|involving|with|where|in\s+which|on|called|titled|entitled|named|set\s+in)"
)
_KINDS = (
    r"(?:(?:very|short|long|little|brief|new|funny|happy|sad|scary|sweet|cute|nice|good|great|simple|silly|magical|exciting"
    r"|interesting|bedtime|children[\u2019']?s|kids?[\u2019']?s?|adventure|fantasy|tiny|quick|beautiful|gentle)(?:,|\s+and)?\s+)*"
)
_NO_PERSON = {"with", "where", "in which", "on", "called", "titled", "entitled", "named", "set in"}
_FLAGS = re.IGNORECASE | re.DOTALL

_GO_ON = re.compile(
    rf"{_POLITE}(?:continue|go\s+on|keep\s+(?:going|writing)|carry\s+on|write\s+more|(?:tell\s+me\s+)?more"
    r"|(?:and\s+)?then(?:\s+what)?|what\s+happen(?:s|ed)\s+(?:next|then)|next|finish)"
    r"(?:\s+(?:it|(?:the|this|that|your)\s+(?:story|tale)))?(?:,?\s+please)?[\s.!?…]*",
    _FLAGS,
)
_CONTINUE = re.compile(
    rf"{_POLITE}(?:continue|finish|complete|go\s+on\s+with)\s+(?:(?:the|this|my|our)\s+)?(?:following\s+)?"
    rf"(?:{_STORY}|text|beginning|sentence)?\s*(?::|\n)\s*(?P<text>\S.*)",
    _FLAGS,
)
_STARTING_WITH = re.compile(
    rf"{_POLITE}{_VERB}(?:an?|the)\s+{_KINDS}{_STORY}{_AUDIENCE},?\s+(?:that|which)?\s*(?:starts|starting|begins|beginning)"
    r"\s+(?:with|like\s+this|as\s+follows)(?:\s+the\s+(?:words?|sentence|line))?\s*(?::\s*(?P<text>\S.*)"
    r'|(?P<quoted>["“\u2018\'].*["”\u2019\'])\.?)',
    _FLAGS,
)
_INSTRUCTION = re.compile(
    rf"{_POLITE}{_VERB}(?:[\w'\u2019-]+,?\s+){{0,6}}?{_STORY}{_AUDIENCE}(?:\s+{_LINK}\s+(?P<subject>\S.*)|(?:,?\s+please)?[.!?]*)",
    _FLAGS,
)
_ABOUT = re.compile(rf"{_POLITE}(?:write|tell\s+(?:me|us))\s+(?P<link>about)\s+(?P<subject>\S.*)", _FLAGS)
_TITLE = re.compile(rf"(?:(?:an?|another|one)\s+)?{_KINDS}{_STORY}\s+(?P<link>about)\s+(?P<subject>[^.!?]+)", _FLAGS)
"""An instruction without a verb, "a short story about a fox": one that ends like a sentence may be a story's own."""

_ASIDE = re.compile(r"\s*\([^()]*\)")
_SENTENCE_END = re.compile(r"[.!?][\"”'\u2019)]?\Z")
_SENTENCES = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])\s+")
_TRAILING = re.compile(
    r"(?:[,;:]?\s*\b(?:please|thanks|thank\s+you)|[\s.!?,;:…]+"
    r"|,?\s+(?:in|of|with|using)\s+(?:(?:at\s+most|no\s+more\s+than|less\s+than|fewer\s+than|under|about|around|up\s+to)\s+)?"
    r"\d+\s+(?:words?|sentences?|lines?|paragraphs?|tokens?)"
    r"|,?\s+for\s+(?:(?:my|young|small|little)\s+)*(?:kids|children|toddlers|son|daughter))\Z",
    re.IGNORECASE,
)
"""What says how to write and not what about, at the end of a subject."""
_WISH = re.compile(
    r"(?:please|make|keep|use|write|include|end|start|begin|add|give|let|do|don['\u2019]t|avoid|be|thanks|thank|you|i|it\s+(?:should|must)"
    r"|(?:the|this)\s+(?:story|tale|ending|moral|length)|in\s+\d|no\s+more|at\s+most|at\s+least|maximum|max)\b",
    re.IGNORECASE,
)
"""A sentence that says how to write."""
_ARTICLE = re.compile(
    r"(?:(?P<many>(?:a\s+few|a\s+couple\s+of|two|three|four|five|six|seven|eight|nine|ten|some|several|many)\b)|(?:an?|one)\b)",
    re.IGNORECASE,
)
_NAME = r"[A-Z][\w'\u2019-]*(?:\s+[A-Z][\w'\u2019-]*){0,2}"
_NAMES = re.compile(
    rf"{_NAME}(?:(?:,|\s+and|,\s+and|\s+the)\s+(?:(?:his|her|their|the|an?)\s+)?(?:[\w'\u2019-]+)(?:\s+[A-Z][\w'\u2019-]*)?){{0,3}}"
)
