"""Growing up, without the page: a prompt of the user's is continued by the ages of one training run.

The ages are not what serves: each is loaded by itself, writes in a thread and is dropped. The rate limits count them as
those of the page's other stories.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from demo.handlers import refusal
from experiments.dashboard.ages import continue_with
from experiments.dashboard.client import StoreClient, UnreadableError
from experiments.dashboard.records import AgeRow, RunRow
from model.errors import DrainingError, InputError, ModelError, StoryError
from model.generation import GenerationRequest, SamplingParams
from model.serving.session import GenerationManager

log = logging.getLogger(__name__)

MAX_TOKENS = 60
"""Of each age's continuation."""
SEED = 1
NO_RUN = "The store has no run with this id or name."
NO_AGES = "This run has kept no ages: it was made before, by a sweep, or with `ages=0`. A new `story train` keeps them."
RECORDED = "The ages of the shipped model are too large for its record; `story train` keeps those of your own runs."
NO_AGED_RUN = "No run has kept its ages yet; `story train` does."

Values = dict[str, Any]
"""What `assets/grow.js` draws."""


async def grow_up(
    store: StoreClient, manager: GenerationManager, client: str, prompt: object, run: str = "", seed: int = SEED
) -> AsyncGenerator[Values, None]:
    """Let each age of a run continue `prompt` in turn, the youngest first, all with the same seed.

    `run` is an id, its first eight characters or a name; empty: the best run that has ages. `client` is as the rate
    limits know it: a call counts as one story, and with the tokens of all ages.

    Yields all that is known so far: the `run`'s name, the `prompt`, how many ages come (`count`), and `ages`, each with
    its `text` and whether that `ended` by itself. `done` stands in the last one, with a `note` where it came early.
    """
    grown: Values = {"run": run, "prompt": prompt, "count": 0, "ages": [], "note": "", "done": False}
    try:
        request = _request(prompt, seed)
        row, ages = await _aged_run(store, run)
        grown |= {"run": row.name, "prompt": request.prompt, "count": len(ages)}
        if manager.draining:
            raise DrainingError
        limiter = manager.limiter
        with contextlib.ExitStack() as held:
            reservation = None if limiter is None else await limiter.admit(client, [request] * len(ages), stories=1)
            if reservation is not None:
                held.callback(reservation.release)
                reservation.commit(stories=1)
            yield grown
            for age in ages:
                written, tokens = await _written(store, row.id, age, request)
                if reservation is not None:
                    reservation.commit(tokens=tokens)
                yield (grown := grown | {"ages": [*grown["ages"], written]})
                if manager.draining:
                    raise DrainingError
        yield grown | {"done": True}
    except UnreadableError as error:
        yield grown | {"done": True, "note": str(error)}
    except StoryError as error:
        yield grown | {"done": True, "note": refusal(error)}
    except Exception as error:  # the outermost handler: the user keeps the page, the log gets the reason
        log.exception("the ages of run %s cannot write", run)
        yield grown | {"done": True, "note": f"Something went wrong on this side: {type(error).__name__}."}


def why_no_ages(row: RunRow | None) -> str:
    """Return in one line why a run cannot continue a prompt by its ages; empty: it can."""
    if row is None or row.ages:
        return NO_AGED_RUN if row is None else ""
    return RECORDED if row.recorded else NO_AGES


def _request(prompt: object, seed: int) -> GenerationRequest:
    """What each age is asked for: they differ in their weights alone. Raises `InputError` that names the field."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("prompt", "must be the beginning of a story, got nothing")
    # A name is not kept by rule here, as in a story of the page: what a young network makes of it is to be seen.
    sampling = SamplingParams(seed=seed, keep_names=False)
    return GenerationRequest(prompt=prompt.rstrip(" \t"), max_tokens=MAX_TOKENS, sampling=sampling)


async def _aged_run(store: StoreClient, wanted: str) -> tuple[RunRow, list[AgeRow]]:
    """The run and its ages. Raises `UnreadableError`, whose message is a sentence, where there are none."""
    runs = (await store.overview(stale_ok=True)).runs
    if wanted:
        row = next((run for run in runs if wanted in (run.id[:8], run.id, run.name)), None)
    else:
        aged = [run for run in runs if run.ages]
        row = min(aged, key=lambda run: (run.bits_per_byte is None, run.bits_per_byte), default=None)
    if reason := NO_RUN if wanted and row is None else why_no_ages(row):
        raise UnreadableError(reason)
    assert row is not None
    if not (ages := await store.ages(row.id)):
        raise UnreadableError("The list of this run's ages cannot be read.")
    return row, ages


async def _written(store: StoreClient, run: str, age: AgeRow, request: GenerationRequest) -> tuple[Values, int]:
    """What an age writes, with its figures, and how many tokens that are. Raises `UnreadableError`."""
    folder = await store.age_folder(run, age.step)
    try:
        done = await asyncio.to_thread(continue_with, folder, request)
    except ModelError as error:
        log.warning("step %d of run %s cannot be used: %s", age.step, run, error)
        raise UnreadableError(f"The age at step {age.step:,} cannot write; the server's log says why.") from None
    written = {"text": done.text, "ended": done.finish_reason == "stop"}
    return age.model_dump() | written, done.usage.completion_tokens
