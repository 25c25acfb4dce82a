"""Templates in the manner of each model family render as HF transformers renders them, from the same folder."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pdserve.errors import InvalidRequest
from router.text.chat_template import ChatTemplate

Messages = list[dict[str, Any]]

# Written for this test, with what the families' own use.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("One call at a time.") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- else %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """{%- set loop_messages = messages[1:] if messages[0].role == "system" else messages %}
{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ["user", "assistant"] and not message.tool_calls %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
    {%- if message.role == "user" %}{{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.role == "assistant" and message.content %}{{- " " + message.content|trim + eos_token }}
    {%- elif message.role == "tool" %}{{- '[RESULTS] {"content": ' + message.content|string + "}" }}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function or call %}
        {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
        {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
    {%- if loop.index0 > ns.last_query_index and loop.last %}{{- '#' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""
PHI = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""
SMOLLM = """{%- set reasoning = "/no_think" if enable_thinking is false else "/think" -%}
{{- "<|im_start|>system\\n## Metadata\\n\\nToday Date: " ~ strftime_now("%d %B %Y") ~ "\\n" ~ reasoning ~ "\\n" -}}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {% generation %}
        {%- set text = message.content.lstrip("\\n") -%}
        {{- "<|im_start|>assistant\\n" + text + "<|im_end|>\\n" -}}
        {% endgeneration %}
    {%- elif message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif -%}
    {{- text is defined -}}
{%- endfor -%}
"""
GRANITE = """{%- if messages[0]['role'] == 'system' %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{{- 'Today: ' + strftime_now('%B %d, %Y') + '.' }}{%- endif %}
{%- if tools %}{{- '<tools>' + tools | tojson(indent=4, sort_keys=true) + '</tools>' }}{%- endif %}
{%- if documents %}{%- for document in documents %}{{- document['text'] }}{%- endfor %}{%- endif %}
{%- for message in loop_messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' + '<|end_of_role|>' }}{%- endif %}
{%- endfor %}"""
OLMO = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% if not loop.last %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}{{ message['content'] + eos_token }}
{% endif %}{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
TEMPLATES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "gemma": GEMMA,
    "phi": PHI,
    "smollm": SMOLLM,
    "granite": GRANITE,
    "olmo": OLMO,
}

SYSTEM = {"role": "system", "content": " Be <brief> & kind.\n"}
ASK = {"role": "user", "content": "  What is 2 < 3 in \u00e9t\u00e9?\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue \u2713"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "\u00e9<"}}}],
}
RESULT = {"role": "tool", "content": "5"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <b>.",
            "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}},
        },
    }
]
CONVERSATIONS: dict[str, Messages] = {
    "one": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [ASK, ANSWER, ASK],
    "all": [SYSTEM, ASK, ANSWER, ASK, ANSWER],
    "calls": [ASK, CALL, RESULT],
    "odd": [ASK, ASK],
}


@pytest.fixture(params=TEMPLATES, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    """Both read the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATES[request.param],
    ).save_pretrained(folder)
    ours = ChatTemplate.from_folder(folder)
    assert ours is not None
    return ours, PreTrainedTokenizerFast.from_pretrained(folder)


def theirs_of(theirs: PreTrainedTokenizerFast, messages: Messages, **arguments: Any) -> str | None:
    """The text, or None where the template refuses."""
    from jinja2 import TemplateError

    try:
        return str(theirs.apply_chat_template(messages, tokenize=False, **arguments))
    except TemplateError:
        return None


def ours_of(ours: ChatTemplate, messages: Messages, **arguments: Any) -> str | None:
    try:
        return ours.render(messages, **arguments)
    except InvalidRequest:
        return None


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompted", [True, False], ids=["prompted", "whole"])
def test_a_template_renders_as_with_transformers(
    pair: tuple[ChatTemplate, PreTrainedTokenizerFast], name: str, tools: list[dict[str, Any]] | None, prompted: bool
) -> None:
    ours, theirs = pair
    messages = CONVERSATIONS[name]
    before = theirs_of(theirs, messages, tools=tools, add_generation_prompt=prompted)
    got = ours_of(ours, messages, tools=tools, add_generation_prompt=prompted)
    after = theirs_of(theirs, messages, tools=tools, add_generation_prompt=prompted)
    assert got in (before, after)  # two, for some print the date


@pytest.mark.parametrize("pair", ["qwen", "smollm"], indirect=True)
def test_variables_reach_the_template(pair: tuple[ChatTemplate, PreTrainedTokenizerFast]) -> None:
    ours, theirs = pair
    for value in (True, False):
        expected = theirs_of(theirs, [ASK], add_generation_prompt=True, enable_thinking=value)
        assert ours_of(ours, [ASK], variables={"enable_thinking": value}) == expected
