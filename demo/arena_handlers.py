"""What the page Arena does, without the page: battles between contestants, votes, and the scores they make.

Two contestants write from one prompt with the same seed. Who they are stays on this side until the vote; so do the
stories of a battle, in memory, because a vote must be about what was sent. Times are checked by this side's clock: a
vote that comes before both stories could be read is kept, and not counted.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qsl

from demo.form import Form
from demo.handlers import SILENCE, AppState, coalesce, refusal
from demo.routing import RoutingBackend
from experiments.ab.events import Vote, new_id, sqlite_file
from experiments.arena.contestants import Contestant
from experiments.arena.score import POINTS, Scores, notes, score
from experiments.arena.votes import read_votes, tally
from model.errors import InputError, StoryError
from model.generation import GenerationRequest, choice_seed, new_seed
from model.serving.logs import new_request_id, request_id
from model.serving.session import UNKNOWN, GenerationSession

log = logging.getLogger(__name__)

AGAINST_ITSELF = 10
"""One battle of so many is a contestant's with itself, with another seed: it measures what a side is worth."""
OPEN = 1_000
"""Battles that wait for their vote at most; the oldest are forgotten."""
READING = 15.0
"""Words a second: nobody reads faster."""
UNSEEN, FAST = "an end was not seen", "too fast to have been read"

Phase = Literal["empty", "waiting", "writing", "reading", "voted", "failed"]
"""`reading`: both stories are there, and the vote is open or opens when they can have been read."""


@dataclass(slots=True)
class Battle:
    """Two stories from one prompt, and who wrote them; the first stands on the left."""

    prompt: str
    seed: int
    user: str
    contestants: tuple[Contestant, Contestant]
    digests: tuple[str, str]
    """Of their model folders when the battle began."""
    key: str = field(default_factory=new_id)
    stories: list[str] = field(default_factory=lambda: ["", ""])
    began: float | None = None
    """When the first word was sent, by `time.monotonic`."""

    @property
    def needed(self) -> float:
        """Seconds that reading both takes at least."""
        return sum(len(story.split()) for story in self.stories) / READING


@dataclass(frozen=True, slots=True)
class View:
    """All that the page shows of a battle."""

    phase: Phase = "empty"
    battle: str = ""
    prompt: str = ""
    first: str = ""
    second: str = ""
    needed: float = 0.0
    """See `Battle.needed`."""
    status: str = ""
    beat: int = 0
    """Counts views without news, so that the browser knows that the connection stands."""
    result: dict[str, Any] | None = None
    """After the vote: see `vote`."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Arena:
    """The battles of one application."""

    app: AppState
    routing: RoutingBackend
    open: OrderedDict[str, Battle] = field(default_factory=OrderedDict)
    """Battles that have ended and wait for their vote, by their keys."""

    @classmethod
    def of(cls, app: AppState) -> "Arena | None":
        """The arena of an application that has contestants and records votes."""
        routing = app.recorder
        return None if routing is None or not routing.contestants else cls(app, routing)

    def digest(self, contestant: Contestant) -> str:
        """Of the model folder that serves it now."""
        return self.routing.backends[contestant.model].model.version


def pair(contestants: tuple[Contestant, ...]) -> tuple[Contestant, Contestant]:
    """Draw who fights, and on which side; now and then somebody against himself."""
    draw = secrets.SystemRandom()
    if draw.randrange(AGAINST_ITSELF) == 0:
        one = draw.choice(contestants)
        return one, one
    first, second = draw.sample(contestants, 2)
    return first, second


async def battle(
    arena: Arena, tab: str, prompt: str, client: str = UNKNOWN, user: str = "", seed: int | None = None
) -> AsyncGenerator[View, None]:
    """Let two contestants write from `prompt`; the parameters are those of `handlers.write`.

    However this generator ends, its session is closed.
    """
    form = Form(prompt=(prompt or "").rstrip(" \t"), seed=new_seed() if seed is None else seed)
    view = View(prompt=form.prompt)
    if problems := form.problems() or ({} if form.prompt else {"Prompt": "A prompt is needed: type one or press one"}):
        yield replace(view, phase="failed", status=" ".join(f"{problem}." for problem in problems.values()))
        return
    request_id.set(reference := new_request_id())
    first, second = pair(tuple(arena.routing.contestants))
    digests = arena.digest(first), arena.digest(second)
    made = Battle(form.prompt, form.seed or 0, user, (first, second), digests)
    requests = _requests(made, form, cacheable=seed is not None)
    session: GenerationSession | None = None
    try:
        session = arena.app.sessions[tab] = arena.app.manager.session(requests, client)
        async with session, contextlib.aclosing(coalesce(session.events(SILENCE))) as batches:
            yield (view := replace(view, phase="waiting", status="Both are writing …"))
            async for events in batches:
                for event in events:
                    if event is not None and event.chunk is not None:
                        made.stories[event.number] += event.chunk.text
                if any(made.stories):
                    made.began = made.began or time.monotonic()
                    view = replace(view, phase="writing", first=made.stories[0], second=made.stories[1])
                yield (view := replace(view, beat=view.beat + 1))
        if session.stopped:  # the tab was left, or has begun another battle
            return
        arena.open[made.key] = made
        while len(arena.open) > OPEN:
            arena.open.popitem(last=False)
        yield replace(view, phase="reading", battle=made.key, needed=made.needed, status="")
    except StoryError as error:
        yield replace(view, phase="failed", status=refusal(error))
    except Exception:  # the outermost handler: the user keeps the page, the log gets the reason
        log.exception("a battle failed", extra={"request_id": reference})
        why = f"Something went wrong on this side. (Reference {reference[:8]})"
        yield replace(view, phase="failed", status=why)
    finally:
        if arena.app.sessions.get(tab) is session:
            arena.app.sessions.pop(tab, None)


def _requests(made: Battle, form: Form, *, cacheable: bool) -> list[GenerationRequest]:
    """The same seed for both; where both are the same, that would be the same story twice."""
    itself = made.contestants[0] == made.contestants[1]
    return [
        GenerationRequest(
            prompt=form.prompt,
            max_tokens=form.max_tokens,
            sampling=each.sampling(choice_seed(made.seed, number if itself else 0)),
            wishes=each.wishes,
            cacheable=cacheable,
            variant=each.model,
        )
        for number, each in enumerate(made.contestants)
    ]


async def vote(
    arena: Arena, key: object, choice: object, first_read: object = None, second_read: object = None
) -> dict[str, Any]:
    """Store the vote on a battle, and tell who fought.

    `first_read` and `second_read` are the seconds after which the end of each story had been seen, None if it was not.
    Returns `names`, whether the vote is `counted`, if not `why`, and the `scores`.

    Raises `InputError` for a choice that is none, and for a battle that is not open.
    """
    if not isinstance(choice, str) or choice not in POINTS:
        raise InputError("choice", f"must be one of {', '.join(POINTS)}, got {choice!r}")
    reads = _seconds("first_read", first_read), _seconds("second_read", second_read)
    made = arena.open.pop(key, None) if isinstance(key, str) else None
    if made is None:
        raise InputError("battle", "is not open: it has had its vote, or was left for long")
    recorder = arena.routing.recorder
    seconds = time.monotonic() - (made.began or time.monotonic())
    sides: dict[str, Any] = {}
    parts = zip(("first", "second"), made.contestants, made.digests, made.stories, reads, strict=True)
    for side, each, digest, story, read in parts:
        sides |= {side: str(each), f"{side}_digest": digest, f"{side}_settings": each.settings}
        sides |= {f"{side}_story": _digest(story), f"{side}_words": len(story.split()), f"{side}_read": read}
    given = Vote(
        key=made.key,
        user_hash=recorder.hashed(made.user),
        prompt_digest=_digest(made.prompt),
        prompt=made.prompt if recorder.keeps_prompts else None,
        seed=made.seed,
        seconds=seconds,
        choice=choice,
        fault=UNSEEN if None in reads else FAST if seconds < made.needed else "",
        **sides,
    )
    recorder.add(given)
    shown, why = await asyncio.to_thread(_scores, recorder.url, given)
    names = [spelled(str(each)) for each in made.contestants]
    return {"names": names, "choice": choice, "counted": not why, "why": why, "scores": shown}


async def scores(arena: Arena) -> dict[str, Any]:
    """The scores of all votes: `contestants`, the best lower bound first, `notes`, and `battles`."""
    shown, _ = await asyncio.to_thread(_scores, arena.routing.recorder.url, None)
    return shown


def _scores(url: str, given: Vote | None) -> tuple[dict[str, Any], str]:
    """The scores of the stored votes and of `given`, which may be still to be stored, and why that does not count."""
    try:
        file = sqlite_file(url)
        stored = [] if file is not None and not file.exists() else read_votes(url)
    except StoryError as error:
        log.warning("the scores cannot be read: %s", error)
        nothing = {"contestants": [], "notes": ["The scores cannot be read for now."], "battles": 0}
        return nothing, "" if given is None else given.fault
    votes = stored if given is None or any(each.key == given.key for each in stored) else [*stored, given]
    counted = tally(votes)
    why = "" if given is None else counted.faults.get(given.key, "")
    return _plain(score(counted.battles) if counted.battles else None, counted.left_out), why


def _plain(found: Scores | None, left_out: Mapping[str, int]) -> dict[str, Any]:
    if found is None:
        return {"contestants": [], "notes": ["No vote counts yet."], "battles": 0}
    rows = [
        {
            "name": spelled(each.name),
            "battles": each.battles,
            "win_rate": each.win_rate.value,
            "low": each.win_rate.low,
            "high": each.win_rate.high,
            "equal_length": each.equal_length.value,
            "words": each.words,
            "meaningful": each.meaningful,
        }
        for each in found.contestants
    ]
    return {"contestants": rows, "notes": notes(found, left_out), "battles": found.battles}


def spelled(name: str) -> str:
    """A contestant's name as people read it: `champion, temperature 0.5`."""
    name, space, which = name.partition(" ")
    model, _, settings = name.partition("?")
    given = [f"{key.replace('_', ' ')} {value}" for key, value in parse_qsl(settings)]
    return ", ".join([model, *given]) + space + which


def _seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(name, f"must be a number of seconds, got {value!r}")
    return float(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
