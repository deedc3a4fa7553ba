"""A/B routing: which model variant serves a user, and the record of each story for the test's analysis.

`RoutingBackend` sends each request to its user's variant and records it once, whichever interface it came from. With a
single variant it only records.

A variant of `STORY_SPLIT` is a registered version (number, alias or digest), a model folder, a deployment on Modal, or
`default`, which serves without a test. Registered versions are resolved once, at the start: only then is MLflow
imported, and an alias that moves later is seen at the next start.

A first-party cookie with a random id is what makes a returning browser the same user. Gradio's session lasts for one
tab, an address is shared by a household, and some browsers delete what scripts store after seven days. The id is 128
random bits that scripts and other sites cannot read; only its hash is stored. A browser without cookies is a new user
in each tab.
"""

import asyncio
import contextlib
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experiments.ab.assignment import DEFAULT_VARIANT, SETTING, TrafficSplit, parse_split, without_test
from experiments.ab.events import Ending, Exposure, Outcome, Rating, database_url
from experiments.ab.recorder import Recorder
from experiments.arena.contestants import SETTING as ARENA
from experiments.arena.contestants import Contestant, contestants_of
from model.engine.engine import EngineStats
from model.errors import InputError
from model.generation import Chunk, GenerationRequest
from model.serving.backend import Backend, Health, LocalBackend, ModelInfo, Stream
from model.serving.deployments import DEPLOYMENTS
from model.serving.session import Generation
from model.settings import OFF, Settings

if TYPE_CHECKING:
    import gradio as gr

OUTCOMES: dict[str | None, Outcome] = {
    "stop": "finished",
    "length": "length",
    "cancelled": "stopped",
    "error": "failed",
    "refused": "refused",
}
"""Of an outcome of `model.serving.session`, its name in the record."""


class RoutingBackend(Collector):
    """Serve each request with its user's variant, and record it as an `Observer` of the sessions; has metrics of that.

    `variants`: the backend of each variant of `split` with a weight, by its name. `contestants` are those of the arena,
    and `others` the backends of their models that are no variants: no user is assigned to these, and requests that name
    a variant are not recorded.
    """

    def __init__(
        self,
        split: TrafficSplit,
        variants: Mapping[str, Backend],
        recorder: Recorder,
        *,
        contestants: Sequence[Contestant] = (),
        others: Mapping[str, Backend] | None = None,
    ) -> None:
        self.split = split
        self.variants = variants
        self.recorder = recorder
        self.contestants = contestants
        self.backends = {**variants, **(others or {})}
        self.capacity = sum(backend.capacity for backend in variants.values())

    @property
    def compares(self) -> bool:
        """Whether a user may get one of several versions."""
        return len(self.variants) > 1

    @property
    def name(self) -> str:
        """Of the only variant; else `split`."""
        return "split" if self.compares else self._only.name

    @property
    def model(self) -> ModelInfo:
        """Of the only variant; else what can be said for all of them, with a version that changes as they do."""
        if not self.compares:
            return self._only.model
        mixed = hashlib.sha256()
        for name, backend in self.variants.items():
            mixed.update(f"{name}:{backend.model.version}\n".encode())
        name = f"one of {len(self.variants)} versions that are being compared"
        return ModelInfo(name, mixed.hexdigest())

    def model_for(self, user: str) -> ModelInfo:
        """The model of this user's variant."""
        return self._backend(user).model

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run every variant and contestant, and the recorder around them."""
        async with contextlib.AsyncExitStack() as stack:
            recording = self.recorder.running()
            recording.__enter__()
            # Its last batch may take seconds, which the loop needs for streams that are ending.
            stack.push_async_callback(asyncio.to_thread, recording.__exit__, None, None, None)
            for backend in self.backends.values():
                await stack.enter_async_context(backend.running())
            yield

    def health(self) -> Health:
        """Ready while every variant is, since each has users whom no other one serves. Variants are not named."""
        if not self.compares:
            return self._only.health()
        each = [backend.health() for backend in self.variants.values()]
        worst = next((health for health in each if not health.ready), each[0])
        detail = worst.detail if worst.ready else f"a version under test: {worst.detail}"
        engines = [health.engine for health in each if health.engine is not None]
        refused = sum(health.models_refused for health in each)
        return replace(worst, detail=detail, engine=_together(engines) if engines else None, models_refused=refused)

    async def submit(self, request: GenerationRequest) -> Stream:
        """Begin a story with the variant that it names, or its user's; see `Backend.submit`."""
        backend = self.backends[request.variant] if request.variant else self._backend(_user(request))
        return await backend.submit(request)

    def submitted(self, generation: Generation) -> None:
        """Record who gets which variant. No request waits for the recorder."""
        request = generation.request
        if request.variant:
            return
        user = _user(request)
        model = self._backend(user).model
        exposure = Exposure(
            story=request.story_id,
            test=self.split.name,
            split=str(self.split),
            variant=self.split.assign(user),
            user_hash=self.recorder.hashed(user),
            digest=model.version,
            version="" if model.number is None else str(model.number),
            prompt=str(request.prompt) if self.recorder.keeps_prompts else None,
        )
        self.recorder.add(exposure)

    def received(self, generation: Generation, chunk: Chunk) -> None:
        """Record nothing: what counts comes with the end."""

    def ended(self, generation: Generation) -> None:
        """Record the end of a story that was submitted."""
        if not generation.submitted or generation.request.variant:
            return
        request, stream, usage = generation.request, generation.stream, generation.usage
        tokens, rate = usage.completion_tokens, usage.tokens_per_second
        ending = Ending(
            story=request.story_id,
            outcome="aborted" if generation.aborted else OUTCOMES[generation.outcome],
            tokens=tokens,
            ttft=usage.ttft if tokens else None,
            duration=usage.duration,
            rate=rate if rate > 0 else None,
            served_by=self._backend(_user(request)).name if stream is None else stream.served_by,
        )
        self.recorder.add(ending)

    def rate(self, story: str, rating: int) -> None:
        """Record a user's rating of a story: 1 up, -1 down, 0 taken back."""
        self.recorder.add(Rating(story=story, rating=rating))

    def collect(self) -> Iterable[Metric]:
        """Yield what became of recorded events."""
        tally = self.recorder.tally()
        what = "Recorded events of stories and ratings, by what became of them."
        events = CounterMetricFamily("story_events", what, labels=["state"])
        events.add_metric(["written"], tally.written)
        events.add_metric(["lost"], tally.lost)
        yield events
        yield GaugeMetricFamily("story_events_waiting", "Recorded events that are still to be stored.", tally.waiting)

    @property
    def _only(self) -> Backend:
        return next(iter(self.variants.values()))

    def _backend(self, user: str) -> Backend:
        return self.variants[self.split.assign(user)]


def _user(request: GenerationRequest) -> str:
    """The user of a request; an anonymous one is a new one each time."""
    return request.user or request.story_id


def _together(engines: list[EngineStats]) -> EngineStats:
    """Several engines' figures as one's."""
    summed = [field.name for field in fields(EngineStats) if field.type is int]
    reasons = {reason for engine in engines for reason in engine.finished}
    return replace(
        engines[0],
        healthy=all(engine.healthy for engine in engines),
        finished={reason: sum(engine.finished.get(reason, 0) for engine in engines) for reason in reasons},
        last_error=next((engine.last_error for engine in engines if engine.last_error), None),
        **{name: sum(getattr(engine, name) for engine in engines) for name in summed},
    )


def open_variants(
    default: Callable[[], Backend], settings: Settings, *, over: Callable[[Backend], Backend] = lambda backend: backend
) -> Backend:
    """Open `default()`, or the variants of a test, with a recorder where the settings ask for one.

    `over` wraps each variant's backend, with the response cache: cache hits are recorded too.

    Raises `InputError` for a split that cannot be made, `MissingExtraError` where a variant needs packages that are not
    installed, `ModelError` for a folder that cannot be used.
    """
    if not settings.story_feedback:
        for name, value in ((SETTING, settings.story_split), (ARENA, settings.story_arena)):
            if value not in (None, OFF):
                raise InputError(name, "needs STORY_FEEDBACK: a test without users' ratings shows nothing")
        return over(default())
    name = settings.story_split_name
    split = without_test(name) if settings.story_split is None else parse_split(settings.story_split, name)
    salt = settings.story_salt
    recorder = Recorder(
        database_url(settings),
        salt="" if salt is None else salt.get_secret_value(),
        keeps_prompts=settings.story_keep_prompts,
    )
    # A variant without weight gets no user, and needs no model in memory.
    names = [variant.name for variant in split.variants if variant.weight]
    variants = {name: over(_load(name, default, settings)) for name in names}
    contestants = contestants_of(settings.story_arena, split)
    more = dict.fromkeys(each.model for each in contestants if each.model not in variants)
    others = {name: over(_load(name, default, settings, ARENA)) for name in more}
    return RoutingBackend(split, variants, recorder, contestants=contestants, others=others)


def _load(variant: str, default: Callable[[], Backend], settings: Settings, setting: str = SETTING) -> Backend:
    if variant == DEFAULT_VARIANT:
        return default()
    if variant in DEPLOYMENTS and settings.modal_endpoint_url is not None:
        from model.serving.remote import open_deployment

        return open_deployment(variant, settings)
    from experiments.registry.resolve import resolve_model

    try:
        found = resolve_model(variant, settings, bare_names=True)
    except InputError as error:
        raise InputError(setting, f"names the variant {variant!r}, and the {error}") from None
    return LocalBackend.load(settings, found)


COOKIE = "story-user"
KEPT = 400 * 24 * 3600
"""Seconds: as long as browsers keep any cookie."""
_ID = re.compile(r"[0-9a-f]{32}")


def user_of(request: "gr.Request") -> str:
    """The id of whoever sent an event: from the cookie, else of the tab. A call of a component has no tab."""
    return _known(request.cookies) or getattr(request, "session_hash", None) or ""


def _known(cookies: Mapping[str, str]) -> str:
    found = cookies.get(COOKIE, "")
    return found if _ID.fullmatch(found) else ""


class UserCookieMiddleware:
    """ASGI middleware that gives new users of the page an id."""

    def __init__(self, app: ASGIApp, *, root_path: str = "") -> None:
        """`root_path`: under which the page is published."""
        self._app = app
        self._attributes = f"Max-Age={KEPT}; Path={root_path}/; HttpOnly; SameSite=Lax"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; the page itself gets the cookie where the browser has none."""
        if scope["type"] != "http" or scope["path"] != "/" or _known(HTTPConnection(scope).cookies):
            await self._app(scope, receive, send)
            return

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                secure = "; Secure" if scope.get("scheme") == "https" else ""
                value = f"{COOKIE}={secrets.token_hex(16)}; {self._attributes}{secure}"
                MutableHeaders(scope=message).append("set-cookie", value)
            await send(message)

        await self._app(scope, receive, send_with_cookie)
