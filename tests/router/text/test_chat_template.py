"""Chat templates render as HF transformers renders them, in a sandbox, and refuse with a 400."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from pdserve.errors import ConfigError, InvalidRequest
from router.text.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "Hello <b>"}]


def render(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, now=lambda: datetime(2024, 5, 6)).render(messages)


def test_default_model_equals_transformers(default_model: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(default_model)
    template = ChatTemplate.from_folder(default_model)
    assert template is not None
    for messages in (
        HELLO,
        [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "ß"}],
    ):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% if add_generation_prompt %}go{% endif %}", "<s>go"),
        ("{% for m in messages %}\n    {{ m['content'] }}\n    {% endfor %}", "    Hello <b>\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hello <b>"}]'),
        ("{{ 'é' | tojson }}", '"é"'),
        ("{{ strftime_now('%d %b %Y') }}", "06 May 2024"),
        ("{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "1"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
    ],
    ids=["tokens", "trim", "tojson", "no-ascii-escapes", "date", "loop-controls", "no-tools", "namespace"],
)
def test_features_that_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
    ids=["refusal", "undefined", "types", "arithmetic", "escape", "mutation", "recursion"],
)
def test_failure_is_the_clients_400(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.param == "messages"


def test_refusal_shows_the_templates_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_output_is_capped_while_it_grows() -> None:
    template = ChatTemplate("{% for n in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", {}, max_output_chars=100_000)
    with pytest.raises(InvalidRequest, match="too long"):
        template.render(HELLO)


def test_folder_with_the_jinja_file_prefers_it(tmp_path: Path) -> None:
    config = {"chat_template": "old", "bos_token": {"content": "<s>"}, "eos_token": None, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("new {{ bos_token }}{{ eos_token }}{{ add_bos_token }}")
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "new <s>"


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render(HELLO) == "plain"


def test_jinja_file_that_is_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_base_model_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None


@pytest.mark.parametrize("config", ["{", "[]", '{"chat_template": 3}', '{"chat_template": "{% if %}"}'])
def test_damaged_folder_is_a_config_error(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError):
        ChatTemplate.from_folder(tmp_path)
