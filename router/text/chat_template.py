"""The model's chat template: messages to one prompt text, rendered the way HF transformers does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.errors import ConfigError, InvalidRequest

MAX_OUTPUT_CHARS = 8 * 2**20  # twice the largest request body
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token"})
# What a template can hit on odd messages besides its own `raise_exception`.
_RENDER_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class ChatTemplate:
    """A compiled template of the model folder. Clients send no templates, so the source is the operator's.

    Attributes:
        takes_tools: it writes `tools` into the prompt.
        variables: what a client may set beside the messages, such as `enable_thinking`.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        max_output_chars: int = MAX_OUTPUT_CHARS,
    ) -> None:
        """
        Args:
            source: jinja2.
            special_tokens: names such as `bos_token` as the template sees them, with their text.
            now: local time for templates that print the date.

        Raises:
            ConfigError: the source is no valid template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"The chat template cannot be compiled: line {error.lineno}: {error.message}.") from error
        self.source = source
        self.takes_tools = "tools" in names
        self.variables = frozenset(names - _GIVEN - special_tokens.keys() - environment.globals.keys())
        self._special_tokens = dict(special_tokens)
        self._max_output_chars = max_output_chars

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template of `chat_template.jinja`, else of `tokenizer_config.json`; None when the model has none.

        Raises:
            ConfigError: a file is damaged.
        """
        config = _read_config(folder / "tokenizer_config.json")
        source = _read_jinja(folder / "chat_template.jinja") or _default_template(config.get("chat_template"))
        return None if source is None else cls(source, _special_tokens(config))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt text.

        Args:
            tools: as the API has them.
            add_generation_prompt: end where the assistant's answer begins.
            variables: of the template's own.

        Raises:
            InvalidRequest: the template refuses these messages, has no such variable, or its output is too long.
        """
        unknown = sorted(variables.keys() - self.variables)
        if unknown:
            known = f"it has {', '.join(sorted(self.variables))}" if self.variables else "it has none"
            raise InvalidRequest(
                f"The chat template has no variable '{unknown[0][:64]}'; {known}.", param="chat_template_kwargs"
            )
        context = {**variables, **self._special_tokens, "messages": messages, "tools": tools, "documents": None}
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(context, add_generation_prompt=add_generation_prompt):
                length += len(piece)
                if length > self._max_output_chars:
                    raise InvalidRequest("The messages are too long.", param="messages")
                pieces.append(piece)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"The chat template refused the messages: {error}", param="messages") from error
        except _RENDER_ERRORS as error:
            raise InvalidRequest("The chat template cannot render these messages.", param="messages") from error
        return "".join(pieces)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks for training what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With the arguments of HF transformers. Unlike jinja2's own filter: no HTML escapes, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _read_jinja(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid UTF-8.") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object.")
    return config


def _default_template(value: object) -> str | None:
    """`chat_template` is a string, or a list of named ones of which "default" is meant."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise ConfigError("chat_template in tokenizer_config.json must be a string or a list of named templates.")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like: each is a string or an object with `content`."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
