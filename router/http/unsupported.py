"""Parameters of the OpenAI API (and common extensions of it) that are not there.

Each is accepted at the values that mean the same as leaving it out, and refused by name otherwise: never ignored. A
parameter that gets built moves from here into `router.http.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pdserve.errors import InvalidRequest

# parameter -> the values that equal its absence; null always does
Neutral = Mapping[str, tuple[object, ...]]

_COMMON: Neutral = {
    # extensions of other servers
    "length_penalty": (1,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}
COMPLETION: Final[Neutral] = {
    **_COMMON,
    "suffix": ("",),  # needs a model that was trained to fill in the middle
}
CHAT: Final[Neutral] = {
    **_COMMON,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# Fields that a client sends back when it repeats an answer as part of the conversation.
MESSAGE: Final[Neutral] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}


def drop_neutral(fields: dict[str, Any], table: Neutral, prefix: str = "") -> dict[str, Any]:
    """`fields` without those in `table`.

    Raises:
        InvalidRequest: one of them asks for something; names it, with `prefix` in front.
    """
    for name, value in fields.items():
        if value is None or name not in table:
            continue
        if not any(_same(value, neutral) for neutral in table[name]):
            raise InvalidRequest(
                f"'{prefix}{name}' is not supported at this value; leave it out.",
                param=prefix + name,
                code="unsupported_parameter",
            )
    return {name: value for name, value in fields.items() if name not in table}


def _same(value: object, neutral: object) -> bool:
    # True == 1 in Python, but not to a client.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
