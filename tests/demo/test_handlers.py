"""The handlers, called as the page calls them, without a browser."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import AsyncGenerator
from dataclasses import replace
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo import handlers
from demo.form import MAX_QUERY, Form, encode_link
from demo.handlers import View
from model.errors import ModelError, StoryError
from model.serving.backend import LocalBackend
from model.serving.cache import LRUCache, ResponseCache
from model.serving.http.app import SharedState
from model.serving.rate_limit import Limiter, quotas_of
from model.settings import Settings
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend, busy, state_of
from tests.model.runtimes.shared import needs_native

STORY = " he saw a frog. The frog said hello."


async def every(views: AsyncGenerator[View, None]) -> list[View]:
    return [view async for view in views]


async def test_a_story_grows_from_its_prompt_and_ends_with_exact_figures() -> None:
    state = state_of(ScriptedBackend(STORY, pace=0.02))
    views = await every(handlers.write(state, "me", Form(prompt="One day", seed=7)))
    lengths = [len(view.generated) for view in views]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    assert all(later.generated.startswith(sooner.generated) for sooner, later in itertools.pairwise(views))
    assert views[0].phase == "waiting"
    assert {view.phase for view in views[1:-1]} == {"writing"}
    last = views[-1]
    assert (last.phase, last.text) == ("ended", "One day" + STORY)
    # Nine words: eight steps of 1 ms after the first token.
    assert (last.status, last.took) == ("The end", "9 tokens in 0.02 s")
    assert last.figures == "9 tokens · 1,000 tokens/s · first after 12 ms · written by scripted · seed 7"


async def test_a_screen_reader_hears_the_beginning_and_the_end_and_nothing_between() -> None:
    views = await every(handlers.write(state_of(ScriptedBackend(STORY, pace=0.02)), "me", Form(prompt="One day")))
    said = list(dict.fromkeys(view.spoken for view in views))
    assert said == ["Writing.", "The end."]
    assert len({view.figures for view in views}) > 3


async def test_the_story_reaches_the_model_with_the_forms_settings() -> None:
    backend = ScriptedBackend(STORY)
    form = Form(prompt="One day", max_tokens=5, temperature=0.3, top_k=4, min_p=0.1, seed=11)
    await every(handlers.write(state_of(backend), "me", form))
    assert [stream.request for stream in backend.streams] == [replace(form.request(), logprobs=0)]


async def test_wishes_come_true_one_by_one_and_length_and_ending_with_the_end() -> None:
    backend = ScriptedBackend('Then "Hi!" said the fox. It was happy.', pace=0.02)
    form = Form(prompt="One day.", words="fox, cake, day", story_length="short", dialogue="with", ending="happy")
    views = await every(handlers.write(state_of(backend), "me", form))
    assert backend.streams[0].request.wishes == form.wishes
    begun = next(view for view in views if view.wishes)
    unmet = dict.fromkeys(("fox", "cake", "short story", "dialogue", "happy ending"), False)
    assert begun.wishes == unmet | {"day": True}, "which the prompt has"
    assert views[-1].wishes == dict.fromkeys(begun.wishes, True) | {"cake": False}


@needs_native
async def test_a_story_forked_at_a_word_goes_on_from_there_and_with_its_own_words_comes_again() -> None:
    backend = LocalBackend.load(Settings(story_slots=4, story_runtime="native"))
    state = state_of(backend)
    async with backend.running():
        form = Form(prompt="One sunny day", seed=3)
        whole = (await every(handlers.write(state, "me", form)))[-1]
        assert "".join(word for word, _, _ in whole.words) == whole.generated
        cut = replace(whole, words=whole.words[: len(whole.words) // 2])
        again = (await every(handlers.fork(state, "me", form, cut)))[-1]
        assert (again.generated, again.words) == (whole.generated, whole.words)
        fox = [" fox", list(backend.engine.tokenizer.encode(" fox")), 1.0]
        other = (await every(handlers.fork(state, "me", form, replace(cut, words=[*cut.words, fox]))))[-1]
        assert other.generated.startswith("".join(word for word, _, _ in cut.words) + " fox")
        assert other.words[len(cut.words)] == fox
        broken = (await every(handlers.fork(state, "me", form, replace(cut, words=[["x", "y"]]))))[-1]
    assert broken.phase == "failed"


async def test_what_else_could_stand_at_a_word_is_answered_or_why_not() -> None:
    backend = local_backend(slots=4, queue=8)
    state = state_of(backend)
    async with backend.running():
        found = await handlers.look_at(state, {"prompt": "One sunny day", "tokens": []}, "me")
        assert len(found["alternatives"]) > 1
        assert set(found["alternatives"][0]) == {"text", "tokens", "probability"}
        wrong = await handlers.look_at(state, {"prompt": "One", "tokens": ["x"]}, "me")
    assert wrong == {"error": "prompt must be text or token ids, got 'x' among the ids"}


async def test_spaces_at_the_prompts_end_are_dropped_and_line_breaks_kept() -> None:
    backend = ScriptedBackend(STORY)
    await every(handlers.write(state_of(backend), "me", Form(prompt="One day \t ")))
    await every(handlers.write(state_of(backend), "me", Form(prompt="One day.\n\n")))
    assert [stream.request.prompt for stream in backend.streams] == ["One day", "One day.\n\n"]


async def test_stop_ends_the_story_where_it_is_and_lets_it_be_continued() -> None:
    backend = ScriptedBackend(STORY, pace=0.01)
    state = state_of(backend)
    views: list[View] = []
    async for view in handlers.write(state, "me", Form(prompt="One day")):
        views.append(view)
        if view.generated:
            handlers.stop(state, "me")
    assert backend.streams[0].cancelled
    assert views[-1].phase == "open"
    assert views[-1].status == "Stopped"
    assert 0 < len(views[-1].generated) < len(STORY)
    assert state.sessions == {}


async def test_stop_reaches_only_the_session_that_asked() -> None:
    backend = ScriptedBackend(STORY, pace=0.005)
    state = state_of(backend)
    mine = handlers.write(state, "mine", Form())
    yours = handlers.write(state, "yours", Form())
    await anext(mine)
    await anext(yours)
    handlers.stop(state, "mine")
    handlers.stop(state, "nobody")
    assert [stream.cancelled for stream in backend.streams] == [True, False]
    assert (await every(yours))[-1].phase == "ended"
    assert (await every(mine))[-1].phase == "open"


async def test_closing_the_generator_cancels_the_stream_behind_it() -> None:
    backend = ScriptedBackend(STORY, pace=0.005)
    state = state_of(backend)
    async with contextlib.aclosing(handlers.write(state, "me", Form(prompt="One day"))) as views:
        async for view in views:
            if view.generated:
                break
    assert backend.streams[0].cancelled
    assert state.sessions == {}


async def test_continue_goes_on_from_the_whole_text_and_keeps_its_link() -> None:
    backend = ScriptedBackend(STORY, finish="length")
    state = state_of(backend)
    first = (await every(handlers.write(state, "me", Form(prompt="One day", seed=5))))[-1]
    assert first.phase == "open"
    assert first.status == "Stopped at the length you set"
    second = (await every(handlers.resume(state, "me", Form(prompt="something else", seed=6), first)))[-1]
    assert backend.streams[1].request.prompt == "One day" + STORY
    assert second.prompt == "One day"
    assert second.generated == STORY + STORY
    assert (second.link, second.filename) == (first.link, first.filename)


async def test_a_full_queue_is_reported_in_a_friendly_way() -> None:
    views = await every(handlers.write(state_of(ScriptedBackend(STORY, fail=busy())), "me", Form(prompt="Hi")))
    assert [view.phase for view in views] == ["failed"]
    assert views[0].status.endswith("Please try again in about 3 seconds.")
    assert views[0].prompt == "Hi"


async def test_a_known_error_is_shown_in_its_own_words() -> None:
    backend = ScriptedBackend(STORY, fail=ModelError("the model folder is gone"))
    assert (await every(handlers.write(state_of(backend), "me", Form())))[-1].status == "The model folder is gone."


async def test_an_unknown_error_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend(STORY, fail=RuntimeError("secret /etc/path"))
    with caplog.at_level(logging.ERROR):
        views = await every(handlers.write(state_of(backend), "me", Form(prompt="One day")))
    assert "secret" not in views[-1].status + views[-1].spoken
    assert "secret /etc/path" in caplog.text
    assert views[-1].phase == "failed"


async def test_a_story_that_breaks_off_keeps_its_text_and_gives_the_reason() -> None:
    views = await every(handlers.write(state_of(ScriptedBackend(STORY, finish="error")), "me", Form()))
    assert (views[-1].phase, views[-1].generated) == ("failed", STORY)
    assert views[-1].status == "The story broke off: the pen broke"


async def test_while_no_word_has_come_the_page_says_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "SILENCE", 0.02)
    views = await every(handlers.write(state_of(ScriptedBackend("Word", pace=0.2)), "me", Form()))
    assert [view.status for view in views[:2]] == ["Beginning…", "Waiting for the first word…"]
    assert views[1].phase == "waiting"


async def test_the_link_of_a_story_opens_its_prompt_settings_and_seed() -> None:
    backend = ScriptedBackend(STORY)
    form = Form(prompt="One day & night", temperature=1.1, seed=8)
    view = (await every(handlers.write(state_of(backend), "me", form)))[-1]
    values, note = handlers.opened(dict(parse_qsl(view.link)), backend.model.version)
    assert Form(**values) == form
    assert (note.note, note.link) == ("From a link.", view.link)
    opened = await every(handlers.open_link(state_of(backend), "me", note))
    assert backend.streams[-1].request == backend.streams[0].request
    assert [each.note for each in opened] == ["From a link."] * len(opened)


async def test_the_example_counts_for_no_story_limit_and_is_not_ratable() -> None:
    limiter = Limiter(quotas_of("1/minute", "client", "stories"))
    state = state_of(ScriptedBackend(STORY), limiter)
    shown = handlers.example(state.manager.backend.model.version)
    for _ in range(2):
        last = (await every(handlers.open_link(state, "me", shown)))[-1]
        assert (last.phase, last.example, last.story, last.prompt) == ("ended", True, "", handlers.EXAMPLE.prompt)
    forged = replace(shown, link=encode_link(Form(prompt="Mine", seed=1), ""))
    ended = [(await every(handlers.open_link(state, "me", forged)))[-1] for _ in range(2)]
    assert [(view.phase, view.example) for view in ended] == [("ended", False), ("failed", False)]


async def test_a_prompt_too_long_for_a_link_is_written_without_one() -> None:
    backend = ScriptedBackend(STORY)
    form = Form(prompt="é" * 15_000)
    view = (await every(handlers.write(state_of(backend), "me", form)))[-1]
    assert (view.phase, view.link) == ("ended", "")


def test_a_page_opened_without_a_link_stays_as_it_is() -> None:
    values, view = handlers.opened({"__theme": "dark"}, "v")
    assert values == {}
    assert (view.status, view.phase) == ("", "empty")


def test_a_damaged_link_opens_what_it_can_and_says_what_it_could_not() -> None:
    values, view = handlers.opened({"prompt": "Hello", "temperature": "hot", "seed": "4"}, "v")
    assert values == {"prompt": "Hello", "seed": 4}
    assert "Temperature" in view.note
    _, view = handlers.opened({"temperature": "hot"}, "v")
    assert "Temperature" in view.status
    assert view.link == ""


async def test_a_form_with_problems_is_not_sent_and_names_them_by_label() -> None:
    backend = ScriptedBackend(STORY)
    (view,) = await every(handlers.write(state_of(backend), "me", Form(repetition_penalty=9, seed=-1)))
    assert (view.phase, list(view.problems), backend.streams) == ("failed", ["Repetition penalty", "Seed"], [])
    assert view.status == view.spoken == " ".join(f"{problem}." for problem in view.problems.values())
    assert "repetition_penalty" not in view.status


async def test_without_a_seed_each_story_has_another_which_the_view_and_its_link_name() -> None:
    backend = ScriptedBackend(STORY)
    views = [(await every(handlers.write(state_of(backend), "me", Form(seed=None))))[-1] for _ in range(2)]
    seeds = [stream.request.sampling.seed for stream in backend.streams]
    assert [view.seed for view in views] == seeds
    assert [int(dict(parse_qsl(view.link))["seed"]) for view in views] == seeds
    assert seeds[0] != seeds[1]


@given(
    value=st.dictionaries(
        st.sampled_from([*View().as_dict(), "run", "?"]),
        st.none() | st.text() | st.integers() | st.booleans() | st.lists(st.text()),
    )
    | st.none()
    | st.text()
)
def test_a_browser_may_send_any_view(value: object) -> None:
    view = View.sent(value)
    assert [type(part) for part in view.as_dict().values()] == [type(part) for part in View().as_dict().values()]
    assert View.sent(view.as_dict()) == view


@given(prompt=st.text(max_size=300))
def test_a_file_name_is_plain_on_every_system(prompt: str) -> None:
    name = handlers.filename(prompt)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,59}\.txt", name)


def test_a_file_is_named_after_the_first_words() -> None:
    assert handlers.filename("Once upon a time, there was a fox.") == "once-upon-a-time-there-was.txt"
    assert handlers.filename("") == handlers.filename("狐狸") == "story.txt"


async def test_closing_while_the_line_is_long_frees_the_place_in_it() -> None:
    backend = ScriptedBackend(STORY, pace=30.0)
    views = handlers.write(state_of(backend), "me", Form())
    await anext(views)
    await views.aclose()
    assert backend.streams[0].cancelled


def test_errors_have_one_base_so_that_every_one_of_them_is_shown() -> None:
    assert isinstance(busy(), StoryError)
    assert MAX_QUERY < 65_536


async def test_a_client_at_its_limit_gets_a_friendly_message_and_others_read_on() -> None:
    limiter = Limiter(quotas_of("1/minute", "client", "stories"))
    state = state_of(ScriptedBackend(STORY), limiter)
    form = Form(prompt="One day")
    ended = [(await every(handlers.write(state, "me", form, who)))[-1] for who in ("a", "a", "b")]
    assert [view.phase for view in ended] == ["ended", "failed", "ended"]
    assert re.fullmatch(
        r"You have had as many stories as there may be for now\. Please try again in (60|59) seconds\.", ended[1].status
    )
    assert ended[1].text == "One day"


async def test_a_limit_of_all_together_is_nobodys_fault() -> None:
    limiter = Limiter(quotas_of("1/hour", "all", "stories"))
    state = state_of(ScriptedBackend(STORY), limiter)
    await every(handlers.write(state, "me", Form(prompt="One day"), "a"))
    last = (await every(handlers.write(state, "you", Form(prompt="One day"), "b")))[-1]
    assert last.status.startswith("Everyone together has had as many stories as there may be for now.")
    assert last.status.endswith("in 60 minutes.")


async def test_a_user_pays_for_the_tokens_that_were_written_however_the_story_ended() -> None:
    limiter = Limiter(quotas_of("100/minute", "client", "tokens"))
    state = state_of(ScriptedBackend(STORY), limiter)
    for _ in range(10):  # nine tokens each, of a hundred that each might have had but for what was used before
        last = (await every(handlers.write(state, "me", Form(prompt="One day", max_tokens=10), "a")))[-1]
        assert last.phase == "ended"
    last = (await every(handlers.write(state, "me", Form(prompt="One day", max_tokens=11), "a")))[-1]
    assert last.phase == "failed"
    state.manager.backend.fail = busy()  # type: ignore[attr-defined]
    for _ in range(3):
        last = (await every(handlers.write(state, "me", Form(prompt="One day", max_tokens=10), "a")))[-1]
        assert "the queue is full" in last.status


async def test_a_story_from_memory_says_so_and_boasts_of_no_speed() -> None:
    local = local_backend()
    state = state_of(SharedState(cache=ResponseCache(LRUCache(1_000_000, 60), 60)).with_cache(local))
    async with state.manager.running():
        form = Form(prompt="One day", max_tokens=30, seed=7)
        first, again = [(await every(handlers.write(state, "me", form)))[-1] for _ in range(2)]
    assert "written locally" in first.figures
    assert re.fullmatch(r"\d+ tokens · from the cache · seed 7", again.figures)
    assert re.fullmatch(r"\d+ tokens from the cache", again.took)
    assert (again.text, again.phase) == (first.text, first.phase)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "1 second"),
        (0.2, "1 second"),
        (1.0, "1 second"),
        (1.1, "2 seconds"),
        (60, "60 seconds"),
        (61, "2 minutes"),
        (3_600, "60 minutes"),
        (3_601, "2 hours"),
    ],
)
def test_a_time_to_wait_is_reported_in_words_and_never_too_short(seconds: float, words: str) -> None:
    assert handlers.spoken_wait(seconds) == words
