"""Stop strings: whatever the pieces, the output is the text before the first stop string, and no piece of one leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.stop import StopMatcher

# Two letters make overlaps and near misses likely.
TEXT = st.text("ab", max_size=40)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def one_shot(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first; of those that end together, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text, False
    end, negative_length = min(ends)
    return text[: end + negative_length], True


@given(pieces=st.lists(TEXT, max_size=12), stops=STOPS)
def test_equals_one_shot_search(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected, found = one_shot(text, stops)
    matcher = StopMatcher(stops)
    out = ""
    seen = ""
    for piece in pieces:
        out += matcher.push(piece)
        seen += piece
        assert expected.startswith(out)
        held = len(one_shot(seen, stops)[0]) - len(out)
        assert matcher.matched or held < max(map(len, stops))
    assert out + matcher.flush() == expected
    assert matcher.matched == found


@given(text=TEXT, stops=STOPS)
def test_holds_back_no_more_than_could_start_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = matcher.push(text)
    if not matcher.matched:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = (text[start:] for start in range(len(out)))
        assert not any(stop.startswith(suffix) for suffix in longer for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "outputs"),
    [
        (["a", "b", "c"], ["bc"], ["a", "", ""]),
        (["a", "b", "d"], ["bc"], ["a", "", "bd"]),
        (["one\n", "\n", "two"], ["\n\n"], ["one", "", ""]),
        (["x", "🙂", "🙃"], ["🙂🙃"], ["x", "", ""]),
        (["aaab"], ["aab"], ["a"]),
        (["abcd"], ["abcd", "bc"], ["a"]),
        (["xyz"], ["yz", "xyz", "z"], [""]),
    ],
    ids=["spans", "near-miss", "newlines", "unicode", "overlaps-itself", "ends-first", "longest-of-one-end"],
)
def test_pieces(pieces: list[str], stops: list[str], outputs: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(piece) for piece in pieces] == outputs


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("c") == matcher.flush() == ""
