"""The default model with a template that has tools, and conversations in which it calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = """{%- if tools %}<|im_start|>system
Call functions as <tool_call>{"name": ..., "arguments": ...}</tool_call>. Functions: {{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]


CITY = TOOLS[0]
CLOCK = TOOLS[1]
STRICT = {"type": "function", "function": {**CITY["function"], "strict": True}}


def _example(city: str) -> list[dict[str, str]]:
    """A call as the function does not allow it."""
    call = {"name": "get_weather", "arguments": {"city": city, "unit": "kelvin, as physicists count"}}
    return [
        {"role": "user", "content": f"What is the weather in {city}?"},
        {"role": "assistant", "content": f"<tool_call>{json.dumps(call)}</tool_call>"},
    ]


ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
# The small model does as it is shown, so it calls by itself, with arguments that the schema forbids.
SHOWN = [*_example("Oslo"), *_example("Lima"), *_example("Rome"), *ASK]


def taught(model: Path, folder: Path) -> Path:
    """`folder` becomes `model` with the template."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name not in ("chat_template.jinja", "manifest.json"):
            (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def assert_holds(arguments: str) -> None:
    """To the schema of `STRICT`."""
    found = json.loads(arguments)
    assert set(found) == {"city", "unit"}
    assert len(found["city"]) <= 20
    assert found["unit"] in ("celsius", "fahrenheit")
