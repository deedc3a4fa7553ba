"""The tree of a story from a link: where each branch parts and what writes it again.

A link holds no text but the prompt. A branch is the words that it shares with its parent, tokens that were chosen, and,
where one request wrote the rest, the query string with the settings and the seed of that request. So a tree takes a few
hundred characters, and what it opens is what was there: the same seed gives the same bits.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

from demo.form import Form, decode_link
from demo.handlers import ENDINGS, View, filename
from demo.steering import Caller, as_lists, generate, matched, prompt_tokens, words_of
from model.engine.title import title_of
from model.errors import InputError, StoryError
from model.generation import GenerationRequest
from model.serving.backend import model_for
from model.serving.session import GenerationManager

MOST = 64
"""Branches of a link at most."""
LONGEST = 64
"""Tokens of a word at most."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch as a link has it."""

    parent: int
    """Number of a branch before it; -1 for the first."""
    at: int
    """Words that it shares with its parent."""
    words: tuple[tuple[int, ...], ...]
    """The tokens of each of the words that were chosen after them."""
    link: int
    """Number of the link that writes the rest; -1: nothing follows."""
    star: bool
    ended: bool


def read_tree(given: Mapping[str, Any]) -> tuple[str, list[str], list[Branch], int]:
    """Prompt, links, branches and the number of the branch that is shown.

    Raises `InputError` for what no page wrote: a link may hold anything.
    """
    prompt, links, rows, now = (given.get(name) for name in ("prompt", "links", "branches", "now"))
    if not isinstance(prompt, str) or not isinstance(links, list) or not all(isinstance(link, str) for link in links):
        raise InputError("tree", "is damaged")
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST:
        raise InputError("tree", f"must have 1 to {MOST} branches")
    branches = []
    for number, row in enumerate(rows):
        match row:
            case [int(parent), int(at), list(words), int(link), int(star), int(ended)]:
                whole = -1 <= parent < number and at >= 0 and -1 <= link < len(links)
                if not whole or (parent < 0) != (number == 0) or not all(map(_is_word, words)):
                    raise InputError("tree", f"is damaged at branch {number}")
                chosen = tuple(tuple(word) for word in words)
                branches.append(Branch(parent, at, chosen, link, bool(star), bool(ended)))
            case _:
                raise InputError("tree", f"is damaged at branch {number}")
    return prompt, links, branches, now if isinstance(now, int) and 0 <= now < len(rows) else 0


async def regrow(manager: GenerationManager, given: Mapping[str, Any], version: str, caller: Caller) -> dict[str, Any]:
    """Write the branches of a tree again: `branches` with a view each, and the number `now` of the one that is shown.

    It counts as one story for the rate limits, with the tokens of all. Raises what a session raises, and `InputError`.
    """
    prompt, links, branches, now = read_tree(given)
    forms = [Form(**decode_link(dict(parse_qsl(link, keep_blank_values=True)), version)[0]) for link in links]
    root = branches[0].link
    title = title_of(prompt, forms[root].wishes.words if root >= 0 else ())
    start = await prompt_tokens(manager, title + prompt, caller, stories=1)
    _, notes = decode_link({"prompt": prompt, "model": str(given.get("version", ""))}, version)
    note = " ".join(notes) or "From a link."
    grown: list[dict[str, Any]] = []
    for number, branch in enumerate(branches):
        shared = [] if number == 0 else grown[branch.parent]["view"]["words"][: branch.at]
        tokens = (*start, *(token for _, ids, _ in shared for token in ids), *itertools.chain(*branch.words))
        shown = title + prompt + "".join(text for text, _, _ in shared)
        chosen = await _chosen(manager, tokens, branch.words, shown, caller)
        words = [*shared, *chosen]
        seed, link, reason = 0, "", "stop" if branch.ended else "cancelled"
        if branch.link >= 0:
            form, link = forms[branch.link], links[branch.link]
            request = replace(form.request(prompt), prompt=tokens, logprobs=0)
            (done,) = await generate(manager, [request], caller)
            words += as_lists(words_of(done.logprobs, done.text))
            seed, reason = request.sampling.seed, done.finish_reason
        view = View(
            phase="ended" if reason == "stop" else "open",
            prompt=prompt,
            title=title,
            generated="".join(text for text, _, _ in words),
            status=ENDINGS[reason],
            note=note,
            link=link,
            filename=filename(prompt),
            finish_reason=reason,
            seed=seed,
            words=words,
        )
        about = {"parent": branch.parent, "at": branch.at, "star": branch.star, "whole": branch.link >= 0}
        grown.append({**about, "hand": len(chosen), "view": view.as_dict()})
    return {"branches": grown, "now": now}


async def regrown(manager: GenerationManager, given: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
    """`regrow` for the page: with an `error` in words where the tree of a link cannot be written."""
    try:
        return await regrow(manager, given, model_for(manager.backend, caller.user).version, caller)
    except (StoryError, TypeError) as error:
        return {"error": f"The story of this link cannot be opened: {error}."}


def _is_word(value: Any) -> bool:
    """Whether it can be the tokens of a word, whatever tokens these are."""
    return isinstance(value, list) and 0 < len(value) <= LONGEST and all(type(token) is int for token in value)


async def _chosen(
    manager: GenerationManager, tokens: tuple[int, ...], words: tuple[tuple[int, ...], ...], before: str, caller: Caller
) -> list[list[Any]]:
    """The `words` at the end of `tokens`, after the text `before`, with their bits. Raises `InputError`."""
    if not words:
        return []
    ask = GenerationRequest(prompt=tokens, max_tokens=0, echo=True, logprobs=0, prompt_logprobs=0)
    (done,) = await generate(manager, [ask], caller)
    assert done.prompt is not None, "a request with echo has its prompt"
    scored = iter([entry for entry in done.prompt.logprobs if entry is not None][-sum(map(len, words)) :])
    groups = [list(itertools.islice(scored, len(word))) for word in words]
    found = matched(groups, done.prompt.text.removeprefix(before))
    if not found:
        raise InputError("tree", "has tokens that are no text")
    return as_lists(found)
