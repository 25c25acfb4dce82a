"""Calls are found in an answer however it is cut into pieces, and what is no call stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.tool_calls import ToolCallParser, ToolCallText
from router.text.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, ToolFormat, find_format

CALL = '{"name": "f", "arguments": {"a": 1, "b": "é<"}}'
READ = ToolCallText("f", '{"a": 1, "b": "é<"}')
NOTHING = ToolCallText("g", "{}")
ANSWERS = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [READ]),
    (HERMES, f"Well.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "Well.", [READ, READ]),
    (HERMES, f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", [READ, READ]),
    (HERMES, f"<tool_call>{CALL}</tool_call> and more", " and more", [READ]),
    (HERMES, "no <tool call> here, 1 < 2", "no <tool call> here, 1 < 2", []),
    (HERMES, "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
    (HERMES, '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    (HERMES, f"<tool_call>{CALL}", "", [READ]),  # cut by max_tokens behind the JSON
    (HERMES, '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", [READ, READ]),
    (MISTRAL, "[TOOL", "[TOOL", []),
    (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"a": 1, "b": "é<"}', "", [READ]),
    (MISTRAL_NAMED, 'So [TOOL_CALLS]f[CALL_ID]x1[ARGS]{"a": 1, "b": "é<"}[TOOL_CALLS]g {}', "So ", [READ, NOTHING]),
    (MISTRAL_NAMED, f"[TOOL_CALLS][{CALL}]", "", [READ]),
    (MISTRAL_NAMED, '[TOOL_CALLS]f[ARGS]{"a": ', '[TOOL_CALLS]f[ARGS]{"a": ', []),
    (MISTRAL_NAMED, "[TOOL_CALLS]{}", "[TOOL_CALLS]{}", []),
    (LLAMA3, '{"name": "f", "parameters": {"x": []}}', "", [ToolCallText("f", '{"x": []}')]),
    (LLAMA3, f"<|python_tag|>{CALL}; {CALL}", "", [READ, READ]),
    (LLAMA3, 'As JSON: {"name": "f"}', 'As JSON: {"name": "f"}', []),
    (LLAMA3, '{"no": "call"}', '{"no": "call"}', []),
]


@pytest.mark.parametrize(("tool_format", "answer", "content", "calls"), ANSWERS)
@given(data=st.data())
def test_any_cut_of_an_answer_reads_the_same(
    tool_format: ToolFormat, answer: str, content: str, calls: list[ToolCallText], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    parser = ToolCallParser(tool_format)
    text, found = "", []
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        piece, some = parser.push(answer[start:end])
        text, found = text + piece, found + some
    rest, last = parser.flush()
    assert (text + rest, found + last) == (content, calls)


@given(st.text(alphabet="<tol_ca>{}[]TOOL\n x", max_size=60))
def test_text_without_a_call_is_not_changed(text: str) -> None:
    for tool_format in (HERMES, MISTRAL):
        parser = ToolCallParser(tool_format)
        pieces = [parser.push(char) for char in text] + [parser.flush()]
        if not any(calls for _, calls in pieces):
            assert "".join(piece for piece, _ in pieces).replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize(
    ("template", "tool_format"),
    [
        ("{{ '<tool_call>' }}", HERMES),
        ("[TOOL_CALLS]", MISTRAL),
        ("[TOOL_CALLS]x[ARGS]", MISTRAL_NAMED),
        ('"parameters": x', LLAMA3),
        ("{{ tools }}", None),
    ],
)
def test_format_is_found_in_the_template(template: str, tool_format: ToolFormat | None) -> None:
    assert find_format(template) is tool_format


def test_arguments_stay_json() -> None:
    assert json.loads(READ.arguments) == {"a": 1, "b": "é<"}
