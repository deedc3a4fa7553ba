"""A story can be saved and forked at any of its tokens."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.engine.snapshot import KeptStates
from model.errors import InputError
from tests.model.engines import (
    LONG,
    NO_END,
    TOKENIZER,
    by_hand,
    engine,
    request,
    runtime,
    until,
)
from tests.model.fake_runtime import FakeRuntime

# Saving and forking


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    at=st.integers(0, 30),
    keep=st.booleans(),
    keep_limit=st.sampled_from([300, 1000, 10**6]),
    seed=st.integers(0, 50),
    prompt=st.sampled_from(["", "Grüß 🦊", LONG[:150]]),
    stop=st.sampled_from([(), ("e", "🦊"), ("er f", " t", "ä")]),
)
def test_a_fork_at_any_token_goes_on_as_the_story_itself_did(
    at: int, keep: bool, keep_limit: int, seed: int, prompt: str, stop: tuple[str, ...]
) -> None:
    with engine(keep_limit=keep_limit) as e:
        asked = request(prompt, seed=seed, max_tokens=30, stop=stop)
        stream = e.submit(asked, keep_states=keep)
        stream.wait(10)
        tokens, text, reason = by_hand(asked)
        at = min(at, len(tokens))
        left = 30 - at
        saved = stream.snapshot(at)
        assert saved.tokens == (*TOKENIZER.encode(prompt), *tokens[:at])
        if not left or (reason == "stop" and at == len(tokens) and stop):
            return
        fork = e.submit(request("", seed=seed, max_tokens=left, stop=stop), snapshot=saved)
        fork.wait(10)
        assert list(fork.tokens) == tokens[at:]
        assert fork.prompt + fork.completion.text == prompt + text
        assert fork.completion.finish_reason == reason
        assert "".join(piece.text for piece in fork) == fork.completion.text


def test_a_story_is_saved_while_it_is_written_and_the_saved_state_is_not_changed(gated: FakeRuntime) -> None:
    asked = request(seed=4, max_tokens=200)
    with engine(gated) as e:
        stream = e.submit(asked)
        until(lambda: len(stream.tokens) > 5)
        saved = stream.snapshot()
        at = len(saved.tokens) - len(TOKENIZER.encode(asked.prompt))
        assert saved.state.position == len(saved.tokens)  # only the last token is still to be fed
        forks = [e.submit(request("", seed=4, max_tokens=200 - at), snapshot=saved) for _ in range(3)]
        other = e.submit(request("", seed=5, max_tokens=50), snapshot=saved)
        stream.wait(10)
        for fork in forks:
            assert saved.prompt + saved.text + fork.wait(10).text == "Once upon" + stream.completion.text
        assert other.wait(10).text != forks[0].completion.text[: len(other.completion.text)]


async def test_a_fork_of_a_fork_still_goes_on_alike() -> None:
    async with engine(runtime(**NO_END)) as e:
        stream = e.submit(request(seed=8, max_tokens=60), keep_states=True)
        whole = await stream.finished()
        first = await stream.snapshot_async(20)
        fork = e.submit(request("", seed=8, max_tokens=40), snapshot=first, keep_states=True)
        await fork.finished()
        for at in (0, 1, 17, 39):
            second = await fork.snapshot_async(at)
            grandchild = e.submit(request("", seed=8, max_tokens=40 - at), snapshot=second)
            assert grandchild.prompt + (await grandchild.finished()).text == "Once upon" + whole.text


def test_kept_states_make_a_fork_cost_no_step_more_than_its_tokens() -> None:
    network = runtime(**NO_END)
    with engine(network) as e:
        for keep, extra in ((True, 0), (False, 20)):
            stream = e.submit(request(max_tokens=40), keep_states=keep)
            stream.wait(10)
            saved = stream.snapshot(21)
            before = len(network.calls)
            e.submit(request("", max_tokens=5), snapshot=saved).wait(10)
            assert len(network.calls) - before == 5 + extra


def test_a_story_is_continued_after_it_reached_its_length() -> None:
    with engine(runtime(**NO_END)) as e:
        first = e.write(request(seed=6, max_tokens=20))
        first.wait(10)
        rest = e.write(request("", seed=6, max_tokens=25), snapshot=first.snapshot())
        rest.wait(10)
    text = by_hand(request(seed=6, max_tokens=45), runtime(**NO_END))[1]
    assert rest.prompt + rest.completion.text == "Once upon" + text


def test_text_added_at_a_fork_is_read_and_does_not_depend_on_which_states_were_kept() -> None:
    with engine(runtime(**NO_END)) as e:
        texts = []
        for keep in (True, False):
            stream = e.submit(request(seed=2, max_tokens=20), keep_states=keep)
            stream.wait(10)
            whole = next(at for at in range(8, 20) if not stream.snapshot(at).tail)
            fork = e.submit(request(" the bear", seed=2, max_tokens=10), snapshot=stream.snapshot(whole))
            fork.wait(10)
            assert fork.prompt == "Once upon" + TOKENIZER.decode(stream.tokens[:whole]) + " the bear"
            texts.append(fork.completion.text)
        assert texts[0] == texts[1]
        plain = e.submit(request("", seed=2, max_tokens=10), snapshot=stream.snapshot(whole)).wait(10)
        assert plain.text != texts[0]


def test_text_cannot_be_added_inside_a_character() -> None:
    with engine(runtime(**NO_END)) as e:
        for seed in range(50):
            stream = e.write(request(seed=seed, max_tokens=1))
            stream.wait(10)
            saved = stream.snapshot()
            if saved.tail:
                with pytest.raises(InputError, match="inside a character"):
                    e.submit(request("the bear"), snapshot=saved)
                return
    pytest.fail("no story of one token ended inside a character")


def test_a_place_that_was_not_written_cannot_be_saved(gated: FakeRuntime) -> None:
    with engine(gated, slots=1) as e:
        stream = e.write(request(max_tokens=3))
        stream.wait(10)
        with pytest.raises(InputError, match="at must be a whole number between 0 and 3, got 4"):
            stream.snapshot(4)
        busy = e.submit(request(max_tokens=1000))
        waiting = e.submit(request())
        with pytest.raises(InputError, match="has not read its prompt yet"):
            waiting.snapshot()
        busy.cancel()


@given(st.integers(1, 200), st.integers(1, 40))
def test_kept_states_stay_within_their_limit_and_near_every_token(count: int, fitting: int) -> None:
    class State:
        def __init__(self, position: int) -> None:
            self.position = position
            self.nbytes = 10

    kept = KeptStates(first=5, limit=10 * fitting)
    for position in range(6, 6 + count):
        if kept.wants(position):
            kept.add(State(position))
        assert kept.nbytes <= 10 * fitting
    assert kept.stride <= max(1, 2 * count / fitting)
    for position in range(6, 6 + count):
        found = kept.latest(position)
        behind = position - (found.position if found else 5)
        assert 0 <= behind < kept.stride
