"""What the page does, without the page: plain async functions that a test can call.

A handler takes the form and what is on the page, and yields `View`s: the whole visible state, growing. It
knows nothing of Gradio's components. Text is passed on as text; nothing here makes HTML.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from demo import links
from demo.coalesce import coalesce
from demo.form import FIELDS, Form, new_seed
from demo.routing import event_recorder
from experiments.ab.events import new_id
from model.errors import BusyError, InputError, LimitError, StoryError
from model.generation import Completion
from model.serving.backend import CACHE, Backend, Stream, model_for
from model.serving.logs import new_request_id, request_id
from model.serving.rate_limit import UNKNOWN, Limiter, Reservation

log = logging.getLogger(__name__)

Phase = Literal["empty", "waiting", "writing", "ended", "open", "failed"]
"""`ended`: the story reached its end. `open`: it stopped before that and can be continued."""

PLACES = {"local": "locally", "modal": "on Modal"}
"""`served_by` of a stream, in words."""

THANKS = {1: "Noted: you like it.", -1: "Noted: not for you.", 0: "Taken back."}
"""What a screen reader says of a rating."""


@dataclass(frozen=True, slots=True)
class View:
    """All that the page shows of a story."""

    phase: Phase = "empty"
    prompt: str = ""
    """The beginning that the user gave."""
    generated: str = ""
    """What the model has added to it so far."""
    status: str = ""
    """One line: counts while writing, the ending afterwards, or what went wrong."""
    spoken: str = ""
    """What a screen reader says of it: only beginnings and endings, for twenty updates a second are noise."""
    link: str = ""
    """Query string that reopens this prompt and these settings; empty when none can."""
    filename: str = ""
    """Name under which the story is saved."""
    story: str = ""
    """Id under which the story is recorded, where stories are."""
    rating: int = 0
    """The user's rating: 1 likes it, -1 does not, 0 has not said."""

    def as_dict(self) -> dict[str, Any]:
        """The fields, as the browser takes them."""
        return asdict(self)

    @property
    def text(self) -> str:
        """The whole story."""
        return self.prompt + self.generated

    @property
    def busy(self) -> bool:
        """Whether a stream is at work."""
        return self.phase in ("waiting", "writing")


@dataclass(frozen=True, slots=True)
class Buttons:
    """Which buttons can be pressed."""

    write: bool
    stop: bool
    resume: bool
    again: bool
    save: bool
    link: bool
    rate: bool
    """Both thumbs."""


def buttons(view: View) -> Buttons:
    """The buttons that make sense in this state of the page."""
    return Buttons(
        write=not view.busy,
        stop=view.busy,
        resume=view.phase in ("open", "failed") and bool(view.text),
        again=not view.busy and view.phase != "empty",
        save=bool(view.text),
        link=bool(view.link) and view.phase != "empty",
        rate=view.phase in ("ended", "open") and bool(view.generated) and bool(view.story),
    )


@dataclass(slots=True)
class AppState:
    """Backend, rate limiter, and the running stream of each browser session, for Stop and a closed tab."""

    backend: Backend
    streams: dict[str, Stream]
    limiter: Limiter

    @classmethod
    def of(cls, backend: Backend, limiter: Limiter | None = None) -> AppState:
        """The state before the first request."""
        return cls(backend=backend, streams={}, limiter=limiter or Limiter())

    @property
    def records(self) -> bool:
        """Whether stories are recorded, and users may rate them."""
        return event_recorder(self.backend) is not None


def problems(form: Form) -> list[str | None]:
    """For each field, in the form's order: what is wrong with it, or None."""
    found = form.problems()
    return [found.get(name) for name in FIELDS]


def opened(query: Mapping[str, str], version: str) -> tuple[dict[str, Any], View]:
    """The fields that a link fills, with a status line; the seed is always among them, drawn if need be."""
    link = links.decode(query, version)
    note = " ".join(link.notes)
    if link.values and not note:
        note = "Opened from a link. Press Write to read its story."
    return {"seed": new_seed(), **link.values}, View(status=note, spoken=note)


def write(
    state: AppState, session: str, form: Form, client: str = UNKNOWN, user: str = ""
) -> AsyncGenerator[View, None]:
    """Generate a new story from the form's prompt and settings.

    `client` is what the rate limiter counts by, `user` what A/B routing assigns by.

    Spaces at the prompt's end are dropped: in a byte-level vocabulary a word brings its own space along, so
    the model has hardly ever seen a space that stands alone before it has to choose a word.
    """
    form = replace(form, prompt=form.prompt.rstrip(" \t"))
    view = View(prompt=form.prompt, filename=filename(form.prompt), story=new_id() if state.records else "")
    with contextlib.suppress(InputError):  # only a prompt too long for an address: then there is no link
        view = replace(view, link=links.encode(form, model_for(state.backend, user).version))
    return _generate(state, session, form, view, client, user)


def resume(
    state: AppState, session: str, form: Form, view: View, client: str = UNKNOWN, user: str = ""
) -> AsyncGenerator[View, None]:
    """Go on with the story on the page, under the form's settings; its prompt field plays no part."""
    return _generate(state, session, form, view, client, user)


def stop(state: AppState, session: str) -> None:
    """End this session's story at the next step, if one is running; its text stays."""
    if (stream := state.streams.get(session)) is not None:
        stream.cancel()


def rate(state: AppState, view: View, rating: int) -> View:
    """Record the user's rating of the story on the page; the same thumb pressed again takes it back."""
    recorder = event_recorder(state.backend)
    if recorder is None or not buttons(view).rate:
        return view
    rating = 0 if rating == view.rating else rating
    recorder.rate(view.story, rating)
    return replace(view, rating=rating, spoken=THANKS[rating])


async def _generate(
    state: AppState, session: str, form: Form, view: View, client: str, user: str
) -> AsyncGenerator[View, None]:
    """Stream what follows `view.text`. However this generator ends, its stream is cancelled."""
    began = time.perf_counter()
    request_id.set(reference := new_request_id())
    view = replace(view, phase="waiting", status="Beginning…", spoken="Writing.")
    stream: Stream | None = None
    reservation: Reservation | None = None
    try:
        request = replace(form.request(view.text), user=user, story_id=view.story)
        reservation = await state.limiter.admit(client, [request])
        stream = await state.backend.submit(request)
        reservation.commit(stories=1)
        state.streams[session] = stream
        yield view
        tokens, first = 0, 0.0
        served_by: list[str] = []  # in the order in which they served
        async with contextlib.aclosing(coalesce(aiter(stream))) as chunks:
            async for chunk in chunks:
                now = time.perf_counter()
                if stream.served_by != CACHE:
                    reservation.commit(tokens=len(chunk.tokens))
                if chunk.tokens or chunk.text:  # the last text may come after the last token, alone
                    first = first if tokens else now
                    tokens += len(chunk.tokens)
                    if stream.served_by not in served_by[-1:]:
                        served_by.append(stream.served_by)
                        if served_by[1:]:
                            view = replace(view, spoken=f"The story goes on {_where(served_by[-1:])}.")
                    line = _line(tokens, _rate(tokens, now - first), first - began, served_by, form.seed)
                    view = replace(view, phase="writing", generated=view.generated + chunk.text, status=line)
                elif not tokens:
                    view = replace(view, status="Waiting for the first word…")
                yield view
        yield _ended(view, stream.completion, served_by, form.seed)
    except LimitError as error:
        who = "You have had" if error.scope == "client" else "Everyone together has had"
        wait = spoken_wait(error.retry_after)
        yield _failed(view, f"{who} as many stories as there may be for now. Please try again in {wait}.")
    except BusyError as error:
        wait = spoken_wait(error.retry_after)
        yield _failed(view, f"All places are taken and the queue is full. Please try again in about {wait}.")
    except StoryError as error:
        yield _failed(view, f"{str(error)[:1].upper()}{str(error)[1:]}.")
    except Exception:  # the outermost handler: the user keeps the page, the log gets the reason
        log.exception("a story failed", extra={"request_id": reference})
        kept = f"The text so far is kept. (Reference {reference[:8]})"
        yield _failed(view, f"Something went wrong on this side. {kept}")
    finally:
        if reservation is not None:
            reservation.release()
        if stream is not None:
            stream.cancel()
            if state.streams.get(session) is stream:
                del state.streams[session]


def spoken_wait(seconds: float) -> str:
    """A time to wait, in words and never too short: `12 seconds`, `3 minutes`."""
    units = ((3_600, "hour"), (60, "minute"), (1, "second"))
    size, name = next((size, name) for size, name in units if seconds > size or size == 1)
    count = max(1, math.ceil(seconds / size))
    return f"{count} {name}{'s' * (count != 1)}"


def _failed(view: View, message: str) -> View:
    return replace(view, phase="failed", status=message, spoken=message)


def _ended(view: View, completion: Completion, served_by: list[str], seed: int) -> View:
    """The last view of a stream: exact figures, and how it ended in words."""
    if completion.finish_reason == "error":
        reason = completion.error or "the model could not go on"
        return _failed(view, f"The story broke off: {reason}")
    endings = {"stop": "The end", "length": "Stopped at the length you set", "cancelled": "Stopped"}
    ending = endings[completion.finish_reason]
    usage = completion.usage
    line = _line(usage.completion_tokens, usage.tokens_per_second, usage.ttft, served_by, seed)
    status = f"{ending} · {line}" if usage.completion_tokens else ending
    phase: Phase = "ended" if completion.finish_reason == "stop" else "open"
    return replace(view, phase=phase, status=status, spoken=status.replace(" · ", ", ") + ".")


def _rate(tokens: int, seconds: float) -> float:
    """Tokens a second after the first token, as `Usage` counts; 0 while that means nothing yet."""
    return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0


def _where(served_by: list[str]) -> str:
    """Where it was generated, in words: `on Modal, then locally`."""
    return ", then ".join(PLACES.get(place, f"by {place}") for place in served_by)


def _line(tokens: int, rate: float, ttft: float, served_by: list[str], seed: int) -> str:
    """`212 tokens · 1,840 tokens/s · first after 9 ms · written locally · seed 7`. Times in seconds."""
    first = f"{ttft * 1000:.0f} ms" if ttft < 1 else f"{ttft:.1f} s"
    parts = [f"{tokens:,} token{'s' * (tokens != 1)}"]
    if served_by == [CACHE]:  # a cache hit has no rate
        return " · ".join([*parts, "from the cache", f"seed {seed}"])
    if rate > 0:
        parts.append(f"{rate:,.0f} tokens/s")
    return " · ".join([*parts, f"first after {first}", f"written {_where(served_by)}", f"seed {seed}"])


def filename(prompt: str) -> str:
    """A plain file name from the prompt's first words; it cannot leave its folder on any system."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())[:6]
    return f"{'-'.join(words)[:60].strip('-') or 'story'}.txt"
