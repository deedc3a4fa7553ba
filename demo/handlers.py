"""What the page does, without the page: plain async functions that a test can call.

A handler takes the form and what is on the page, and yields `View`s: the whole visible state, growing, about twenty
times a second. It knows nothing of Gradio's components. Text is passed on as text; nothing here makes HTML.
"""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self, TypeVar
from urllib.parse import parse_qsl

from demo.form import FIELDS, Form, decode_link, encode_link, read_form
from demo.routing import RoutingBackend
from demo.steering import Caller, alternatives, as_lists, futures, prompt_tokens, roll, words_of
from experiments.ab.events import new_id
from model.engine.title import title_of
from model.errors import BusyError, DrainingError, GenerationError, InputError, LimitError, StoryError
from model.generation import GenerationRequest, TokenLogprob, Usage, new_seed
from model.serving.backend import CACHE, model_for
from model.serving.logs import new_request_id, request_id
from model.serving.session import UNKNOWN, Generation, GenerationManager, GenerationSession
from model.wishes import Wishes, has_word

log = logging.getLogger(__name__)

Phase = Literal["empty", "waiting", "writing", "ended", "open", "failed"]
"""`ended`: the story reached its end. `open`: it stopped before that and can be continued."""

SILENCE = 0.5
"""Seconds without a token after which a view is sent again, so that a closed tab is noticed."""

PLACES = {"local": "locally", "modal": "on Modal"}
"""`served_by` of a stream, in words."""

EXAMPLE = Form(prompt="One sunny day, Lily found a tiny golden key in the garden.", seed=16)
"""What is being written at a first visit."""
EXAMPLE_NOTE = "An example. Type your own beginning, and press Write."

STORY_ID = re.compile(r"[0-9a-f]{32}")

ENDINGS = {"stop": "The end", "length": "Stopped at the length you set", "cancelled": "Stopped"}

THANKS = {1: "Noted: you like it.", -1: "Noted: not for you.", 0: "Taken back."}
"""What a screen reader says of a rating."""


@dataclass(frozen=True, slots=True)
class View:
    """All that the page shows of a story."""

    phase: Phase = "empty"
    prompt: str = ""
    """The beginning that the user gave."""
    title: str = ""
    """The line of names and words that the model read before it (`model.engine.title`)."""
    generated: str = ""
    """What the model has added to it so far."""
    status: str = ""
    """One line: that it is written, how it ended, or what went wrong."""
    figures: str = ""
    """Tokens, speed, place and seed."""
    took: str = ""
    """Tokens and seconds of a story that has ended."""
    note: str = ""
    """Where the story comes from, above it: from a link, an example."""
    example: bool = False
    """Nobody asked for this story."""
    spoken: str = ""
    """What a screen reader says of it: only beginnings and endings, for twenty updates a second are noise."""
    link: str = ""
    """Query string that reopens this prompt and these settings; empty when none can."""
    filename: str = ""
    """Name under which the story is saved."""
    finish_reason: str = ""
    """Why the model stopped: `stop`, `length` or `cancelled`; empty before that."""
    story: str = ""
    """Id under which the story is recorded, where stories are."""
    rating: int = 0
    """The user's rating: 1 likes it, -1 does not, 0 has not said."""
    seed: int = -1
    """The seed of the last request; -1 before the first."""
    words: list[list[Any]] = field(default_factory=list)
    """Of a story that has ended: of each generated word the text, its tokens, and its surprise in bits."""
    wishes: dict[str, bool] = field(default_factory=dict)
    """What the story is wished to have, in words, and whether it has that yet."""
    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with the form, by the field's label; the request was not sent then."""
    beat: int = 0
    """Counts views without news, so that the browser knows that the connection stands."""

    @classmethod
    def sent(cls, value: object) -> Self:
        """The view that a browser sends. It may send anything: a value of another type is left out."""
        given, usual = value if isinstance(value, dict) else {}, cls()
        names = [entry.name for entry in fields(cls)]
        return cls(**{name: given[name] for name in names if type(given.get(name)) is type(getattr(usual, name))})

    def as_dict(self) -> dict[str, Any]:
        """The fields, as the browser takes them."""
        return asdict(self)

    @property
    def text(self) -> str:
        """The whole story."""
        return self.prompt + self.generated

    @property
    def ratable(self) -> bool:
        """Whether the user may rate the story: a recorded one that has ended."""
        return self.phase in ("ended", "open") and bool(self.generated) and STORY_ID.fullmatch(self.story) is not None


@dataclass(slots=True)
class AppState:
    """The application's sessions: all of them, and the running one of each tab, for Stop and a closed tab."""

    manager: GenerationManager
    sessions: dict[str, GenerationSession] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    """The number that each tab gave its newest story: requests overtake each other."""

    @property
    def recorder(self) -> RoutingBackend | None:
        """What records stories and ratings, where they are recorded."""
        backend = self.manager.backend
        return backend if isinstance(backend, RoutingBackend) else None


def opened(query: Mapping[str, str], version: str) -> tuple[dict[str, Any], View]:
    """The fields that a link fills, and a view whose `link` is to be opened where it names a prompt."""
    values, notes = decode_link(query, version)
    note = " ".join(notes)
    if "prompt" not in values:
        return values, View(status=note, spoken=note)
    form = Form(**{"seed": None, **values}).drawn()
    return values, View(note=note or "From a link.", link=encode_link(form, version))


def example(version: str) -> View:
    """The view of a first visit, whose `link` is to be opened."""
    return View(note=EXAMPLE_NOTE, example=True, link=encode_link(EXAMPLE, version))


def has_example(state: AppState) -> bool:
    """Whether a first visit sees the example: not where versions are compared, which it would bias."""
    return state.recorder is None or not state.recorder.compares


def open_link(
    state: AppState, tab: str, view: View, client: str = UNKNOWN, user: str = ""
) -> AsyncGenerator[View, None]:
    """Write the story of `view.link` at once.

    The example counts by its tokens only: whoever sees it has not asked for a story.
    """
    values, _ = decode_link(dict(parse_qsl(view.link, keep_blank_values=True)), "")
    form = Form(**values)
    return write(state, tab, form, client, user, note=view.note, shows_example=form == EXAMPLE)


def write(
    state: AppState,
    tab: str,
    form: Form,
    client: str = UNKNOWN,
    user: str = "",
    *,
    note: str = "",
    shows_example: bool = False,
) -> AsyncGenerator[View, None]:
    """Generate a new story from the form's prompt and settings, below a `note`.

    `client` is what the rate limiter counts by, `user` what A/B routing assigns by.

    Spaces at the prompt's end are dropped: in a byte-level vocabulary a word brings its own space along, so
    the model has hardly ever seen a space that stands alone before it has to choose a word.
    """
    form = replace(form.drawn(), prompt=form.prompt.rstrip(" \t"))
    story = new_id() if state.recorder and not shows_example else ""
    view = View(prompt=form.prompt, filename=filename(form.prompt), story=story, note=note, example=shows_example)
    with contextlib.suppress(InputError):  # a wish that is none: the form says so below
        view = replace(view, title=title_of(form.prompt, form.wishes.words))
    with contextlib.suppress(InputError):  # only a prompt too long for an address: then there is no link
        view = replace(view, link=encode_link(form, model_for(state.manager.backend, user).version))
    return _generate(state, tab, form, view, client, user, stories=0 if shows_example else None)


def resume(
    state: AppState, tab: str, form: Form, view: View, client: str = UNKNOWN, user: str = ""
) -> AsyncGenerator[View, None]:
    """Go on with the story on the page, under the form's settings; its prompt field plays no part."""
    return _generate(state, tab, replace(form, prompt=""), view, client, user)


async def fork(
    state: AppState, tab: str, form: Form, view: View, client: str = UNKNOWN, user: str = ""
) -> AsyncGenerator[View, None]:
    """Go on after `view.words`, which are the words of a story up to a place and one that was chosen instead.

    With the seed of that story and its own words, the same story comes again.
    """
    try:
        prompt = await prompt_tokens(state.manager, view.title + view.prompt, Caller(client, user))
        view = replace(view, generated="".join(str(word) for word, _, _ in view.words))
        form = replace(form, prompt=view.prompt, seed=max(view.seed, 0))
        with contextlib.suppress(InputError):  # a prompt too long for an address
            view = replace(view, link=encode_link(form, model_for(state.manager.backend, user).version))
        tokens = (*prompt, *(token for _, ids, _ in view.words for token in ids))
        views = _generate(state, tab, replace(form, prompt=""), view, client, user, tokens)
    except (StoryError, ValueError, TypeError) as error:
        yield _failed(view, f"This story cannot be forked: {error}.")
        return
    async with contextlib.aclosing(views):
        async for view in views:
            yield view


async def look_at(state: AppState, given: Mapping[str, Any], client: str, user: str = "") -> dict[str, Any]:
    """Say what could come after the text `prompt` and `tokens`, under the form's `fields`.

    Returns `alternatives`; or `futures`, those of the `seed` of the story, where they are asked for; or the next
    `word`, where the dice are to `roll`; or an `error`.
    """
    caller = Caller(client, user)
    try:
        fields, text = given.get("fields"), given.get("prompt", "")
        form = read_form(*fields) if isinstance(fields, list) and len(fields) == len(FIELDS) else Form()
        title = given.get("title") or title_of(text, form.wishes.words)
        prompt = await prompt_tokens(state.manager, title + text, caller)
        seed = new_seed() if given.get("roll") else given.get("seed", 0)
        sampling = replace(form.request("").sampling, seed=seed)
        request = GenerationRequest(prompt=(*prompt, *given.get("tokens", ())), sampling=sampling)
        if given.get("roll"):
            return {"word": await roll(state.manager, request, caller)}
        if given.get("futures"):
            return {"futures": [each.as_dict() for each in await futures(state.manager, request, caller)]}
        return {"alternatives": [each.as_dict() for each in await alternatives(state.manager, request, caller)]}
    except (StoryError, TypeError) as error:
        return {"error": str(error)}


def stop(state: AppState, tab: str) -> None:
    """End this tab's story at the next step, if one is running; its text stays."""
    if (session := state.sessions.get(tab)) is not None:
        session.stop()


def rate(state: AppState, view: View, rating: int) -> View:
    """Record the user's rating of the story on the page; the same thumb pressed again takes it back."""
    if state.recorder is None or not view.ratable:
        return view
    rating = 0 if rating == view.rating else rating
    state.recorder.rate(view.story, rating)
    return replace(view, rating=rating, spoken=THANKS[rating])


async def _generate(
    state: AppState,
    tab: str,
    form: Form,
    view: View,
    client: str,
    user: str,
    prompt: tuple[int, ...] | None = None,
    stories: int | None = None,
) -> AsyncGenerator[View, None]:
    """Stream what follows `view.text`, or `prompt`, which is the same as tokens.

    `stories`: see `GenerationManager.session`.
    However this generator ends, its session is closed.
    """
    if problems := form.problems():
        yield replace(_failed(view, " ".join(f"{problem}." for problem in problems.values())), problems=problems)
        return
    request_id.set(reference := new_request_id())
    view = replace(view, phase="waiting", status="Beginning…", spoken="Writing.", figures="", took="")
    view = replace(view, finish_reason="", problems={})
    session: GenerationSession | None = None
    try:
        request = replace(form.request(view.text), prompt=view.text if prompt is None else prompt, logprobs=0)
        view = replace(view, seed=request.sampling.seed)
        request = replace(request, user=user, story_id=view.story or request.story_id)
        session = state.sessions[tab] = state.manager.session([request], client, stories)
        async with session, contextlib.aclosing(coalesce(session.events(SILENCE))) as batches:
            generation, begun = session.generations[0], len(view.generated)
            tokens: list[TokenLogprob] = []
            yield view
            async for events in batches:
                chunks = [event.chunk for event in events if event is not None and event.chunk is not None]
                if chunks:
                    places, text = generation.places, "".join(chunk.text for chunk in chunks)
                    tokens += [token for chunk in chunks for token in chunk.logprobs]
                    if len(places) > 1:
                        view = replace(view, spoken=f"The story goes on {_where(places[-1:])}.")
                    figures = _figures(generation.usage, places, view.seed)
                    view = replace(view, generated=view.generated + text, figures=figures)
                    view = replace(view, phase="writing", status="Writing…")
                    view = replace(view, wishes=_met(request.wishes, view))
                    yield view
                elif generation.completion is None:
                    if view.phase == "waiting":
                        view = replace(view, status="Waiting for the first word…")
                    view = replace(view, beat=view.beat + 1)
                    yield view
            view = _ended(view, generation)
            words = as_lists(words_of(tokens, view.generated[begun:]))
            yield replace(view, wishes=_met(request.wishes, view), words=[*view.words, *words])
    except StoryError as error:
        yield _failed(view, refusal(error))
    except Exception:  # the outermost handler: the user keeps the page, the log gets the reason
        log.exception("a story failed", extra={"request_id": reference})
        kept = f"The text so far is kept. (Reference {reference[:8]})"
        yield _failed(view, f"Something went wrong on this side. {kept}")
    finally:
        if state.sessions.get(tab) is session:
            state.sessions.pop(tab, None)


def refusal(error: StoryError) -> str:
    """Why there is no story, or no more of it, in words for the user."""
    if isinstance(error, LimitError):
        who = "You have had" if error.scope == "client" else "Everyone together has had"
        wait = spoken_wait(error.retry_after)
        return f"{who} as many stories as there may be for now. Please try again in {wait}."
    if isinstance(error, BusyError):
        wait = spoken_wait(error.retry_after)
        return f"All places are taken and the queue is full. Please try again in about {wait}."
    if isinstance(error, DrainingError):
        return "This page is being restarted and writes no more for now. Please try again in a minute."
    if isinstance(error, GenerationError):
        return f"The story broke off: {error}"
    return f"{str(error)[:1].upper()}{str(error)[1:]}."


def spoken_wait(seconds: float) -> str:
    """A time to wait, in words and never too short: `12 seconds`, `3 minutes`."""
    units = ((3_600, "hour"), (60, "minute"), (1, "second"))
    size, name = next((size, name) for size, name in units if seconds > size or size == 1)
    count = max(1, math.ceil(seconds / size))
    return f"{count} {name}{'s' * (count != 1)}"


def _met(wishes: Wishes, view: View) -> dict[str, bool]:
    """Each wish in words, and whether it came true. Length and ending do when the story ends."""
    met = {word: has_word(view.text, word) for word in wishes.words}
    whole = wishes.met(view.text)
    if wishes.length is not None:
        met[f"{wishes.length} story"] = view.phase == "ended" and whole["length"]
    if wishes.dialogue is not None:
        met["dialogue" if wishes.dialogue else "no dialogue"] = whole["dialogue"]
    if wishes.ending is not None:
        met[f"{wishes.ending} ending"] = view.phase == "ended" and whole["ending"]
    return met


def _failed(view: View, message: str) -> View:
    return replace(view, phase="failed", status=message, spoken=message)


def _ended(view: View, generation: Generation) -> View:
    """The last view of a stream: exact figures, and how it ended in words."""
    ending = ENDINGS[str(generation.outcome)]
    usage, places = generation.usage, generation.places
    if tokens := usage.completion_tokens:
        time = "from the cache" if places == [CACHE] else f"in {max(usage.duration, 0.01):.2f} s"
        view = replace(view, figures=_figures(usage, places, view.seed), took=f"{_count(tokens)} {time}")
    phase: Phase = "ended" if generation.outcome == "stop" else "open"
    spoken = f"{ending}, written {_where(places)}." if len(places) > 1 else f"{ending}."
    return replace(view, phase=phase, status=ending, spoken=spoken, finish_reason=str(generation.outcome))


def _where(served_by: list[str]) -> str:
    """Where it was generated, in words: `on Modal, then locally`."""
    return ", then ".join(PLACES.get(place, f"by {place}") for place in served_by)


def _count(tokens: int) -> str:
    return f"{tokens:,} token{'s' * (tokens != 1)}"


def _figures(usage: Usage, served_by: list[str], seed: int) -> str:
    """`212 tokens · 1,840 tokens/s · first after 9 ms · written locally · seed 7`."""
    tokens, rate, ttft = usage.completion_tokens, usage.tokens_per_second, usage.ttft
    parts = [_count(tokens)]
    if served_by == [CACHE]:  # a cache hit has no rate
        return " · ".join([*parts, "from the cache", f"seed {seed}"])
    if rate > 0:
        parts.append(f"{rate:,.0f} tokens/s")
    first = f"{ttft * 1000:.0f} ms" if ttft < 1 else f"{ttft:.1f} s"
    return " · ".join([*parts, f"first after {first}", f"written {_where(served_by)}", f"seed {seed}"])


def filename(prompt: str) -> str:
    """A plain file name from the prompt's first words; it cannot leave its folder on any system."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:6]
    return f"{'-'.join(words)[:60].strip('-') or 'story'}.txt"


INTERVAL = 0.05
"""Seconds between two lists: 20 redraws a second look like a steady flow."""

T = TypeVar("T")


async def coalesce(items: AsyncIterator[T], *, interval: float = INTERVAL) -> AsyncGenerator[list[T], None]:
    """Pass on `items` in lists, the first item at once and later ones as they gather over `interval` seconds.

    What has gathered when the source ends is passed on at once, before an error of the source is raised. Closing this
    generator cancels the task that reads `items`.
    """
    gathered: list[T] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        try:
            async for item in items:
                gathered.append(item)
                arrived.set()
        finally:
            arrived.set()

    source = asyncio.create_task(pump())
    try:
        while not source.done() or gathered:
            await arrived.wait()
            arrived.clear()
            if gathered:
                batch = gathered.copy()
                gathered.clear()
                yield batch
            if not source.done():
                # Wakes early when the source ends, so that a short story is not held back to the next beat.
                await asyncio.wait({source}, timeout=interval)
        await source
    finally:
        source.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await source
