"""Typed access to the fields of a JSON object in a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

# Far above any real model: what lies beyond is a corrupt file.
MAX_COUNT = 2**31 - 1
_MAX_NUMBER = 1e12


@dataclass(frozen=True, slots=True)
class Fields:
    """The object `values` of the file `path`. A field that is null counts as absent.

    Every method raises ConfigError with one sentence that names the file and the field.
    """

    path: Path
    values: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.values)

    def section(self, name: str) -> Fields:
        """An object within the object; absent is empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.path}: {name} must be an object, got {value!r}.")
        return Fields(self.path, value or {})

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value <= MAX_COUNT:
            kind = "a positive integer" if least else "an integer of 0 or more"
            raise ConfigError(f"{self.path}: {name} must be {kind}, got {value!r}.")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return self._positive(name, self._get(name, default))

    def number_or_none(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != length:
            raise ConfigError(f"{self.path}: {name} must be a list of {length} positive numbers.")
        return tuple(self._positive(name, one) for one in value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise ConfigError(f"{self.path}: {name} must be true or false, got {value!r}.")
        return value

    def per_layer(self, name: str, num_layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
        """A list of at least `num_layers` values, each one of `allowed`; None where the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < num_layers or any(one not in allowed for one in value):
            choices = ", ".join(map(str, allowed))
            raise ConfigError(f"{self.path}: {name} must list one of {choices} for each of {num_layers} layers.")
        return value[:num_layers]

    def token_ids(self, name: str, vocab_size: int) -> list[int]:
        """A token id or a list of them; none is an empty list."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ConfigError(f"{self.path}: {name} must be token ids in [0, {vocab_size}), got {value!r}.")
        return ids

    def _positive(self, name: str, value: object) -> float:
        if not isinstance(value, int | float) or type(value) is bool or not 0 < value <= _MAX_NUMBER:
            raise ConfigError(f"{self.path}: {name} must be a positive number, got {value!r}.")
        return float(value)

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.path} lacks {name}.")
        return value
