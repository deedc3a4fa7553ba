"""Stop strings across a change of writer, against one matcher over the whole text."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from model.engine.stop import StopMatcher
from model.serving.remote.failover import ContinuedStop

letters = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), letters, st.lists(letters, max_size=4))
@example(
    ["aab"], "aaa", ["ab", "b"]
)  # let through as the third of four a's, and yet the start of a stop string
def test_a_story_ends_where_one_matcher_over_all_of_it_would_end_it(
    stops: list[str], begun: str, rest: list[str]
) -> None:
    shown = StopMatcher(stops).push(begun)  # what the first writer let through before it was lost
    stop = ContinuedStop(tuple(stops), shown)
    told = shown
    for text in rest:
        told += stop.push(text)
        if stop.met:
            break
    else:
        told += stop.flush()
    whole = StopMatcher(stops)
    expected = whole.push(shown + "".join(rest)) + whole.flush()
    assert stop.met == whole.stopped
    assert told == (
        expected if len(expected) > len(shown) else shown
    )  # what a reader has is never taken back
