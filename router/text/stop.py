"""Stop strings: found in a stream of text pieces, without a piece of one ever leaking."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopMatcher:
    """Passes text through up to the first stop string, whatever the pieces it arrives in.

    The first is the one that ends first, and of those that end together the longest. Text that could be the start of a
    stop string is held back until it is certain; the amount held is below the longest stop string's length.

    An Aho-Corasick automaton over all stop strings ("Efficient string matching", 1975): the depth of the current state
    is the length of the longest suffix of the text that starts a stop string, which is exactly what must be held.
    """

    __slots__ = ("_depth", "_fail", "_found", "_held", "_keep", "_next", "_state", "matched")

    def __init__(self, stop_strings: Iterable[str], *, keep: bool = False) -> None:
        """`stop_strings`: none of them empty; building costs their total length. `keep`: the match is passed too."""
        self.matched = False
        self._keep = keep
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]  # state -> character -> state
        self._depth = [0]  # state -> characters from the root
        self._found = [0]  # state -> length of the longest stop string that ends here, or 0
        self._fail = [0]  # state -> state of the longest proper suffix
        for stop_string in stop_strings:
            self._add(stop_string)
        self._link()

    def push(self, text: str) -> str:
        """The part of the text so far that is new and certain. After a match (`matched`) there is none."""
        if self.matched:
            return ""
        state, goto, fail, found = self._state, self._next, self._fail, self._found
        for position, char in enumerate(text):
            while state and char not in goto[state]:
                state = fail[state]
            state = goto[state].get(char, 0)
            if found[state]:
                self.matched = True
                upto = self._held + text[: position + 1]
                return upto if self._keep else upto[: -found[state]]
        self._state = state
        text = self._held + text
        certain = len(text) - self._depth[state]
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        held, self._held = self._held, ""
        return "" if self.matched else held

    def _add(self, stop_string: str) -> None:
        state = 0
        for char in stop_string:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(0)
                self._fail.append(0)
            state = self._next[state][char]
        self._found[state] = len(stop_string)

    def _link(self) -> None:
        """Suffix links, breadth first: a state's link is shorter than itself, so it is complete when it is needed."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                suffix = self._fail[state]
                while suffix and char not in self._next[suffix]:
                    suffix = self._fail[suffix]
                self._fail[child] = self._next[suffix].get(char, 0)
                self._found[child] = self._found[child] or self._found[self._fail[child]]
                queue.append(child)
