"""How a model rotates, read from the several forms that config.json has had for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from pdserve.errors import ConfigError
from pdserve.models.families import Family
from pdserve.models.fields import Fields

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[RopeKind, ...] = get_args(RopeKind)
_OLDER_NAMES = {"su": "longrope"}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary frequencies and how they are stretched; `pdserve.models.rope` makes the table of it."""

    theta: float
    dim: int  # the first so many elements of a head are rotated
    kind: RopeKind = "default"
    factor: float = 1.0
    amplitude: float = 1.0  # of cos and sin
    original_max_positions: int = 0  # what the model was trained for; 0 where the kind does not ask
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # longrope, [dim / 2] each
    long_factors: tuple[float, ...] = ()

    def stretches_at(self, num_positions: int) -> int:
        """0 where the table for so many positions is the same as for few; else a number that tells such tables apart.

        Two servers with different numbers could not use each other's keys.
        """
        if self.kind not in ("dynamic", "longrope") or num_positions <= self.original_max_positions:
            return 0
        return num_positions if self.kind == "dynamic" else 1


def read_ropes(fields: Fields, family: Family, head_dim: int) -> tuple[Rope, ...]:
    """One rotation for all layers, or, where the family has two, that of full layers and that of windowed ones.

    Raises:
        ConfigError: an unknown kind, or impossible numbers.
    """
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = fields.number("rope_theta", 10_000.0)
    if "rope_local_base_freq" not in family.options:
        return (_read(section, fields, head_dim, theta),)
    # The form of transformers 5 names the layers; before, the stretching was that of full layers alone.
    named = any(isinstance(section.values.get(name), dict) for name in ("full_attention", "sliding_attention"))
    full = section.section("full_attention") if named else section
    local = section.section("sliding_attention") if named else Fields(fields.path, {})
    local_theta = fields.number("rope_local_base_freq")
    return _read(full, fields, head_dim, theta), _read(local, fields, head_dim, local_theta)


def _read(rope: Fields, fields: Fields, head_dim: int, theta: float) -> Rope:
    theta = rope.number("rope_theta", theta)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    kind = _OLDER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_KINDS:
        raise ConfigError(f"{fields.path} asks for rope type {kind!r}; supported: {', '.join(ROPE_KINDS)}.")
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    if share > 1.0 or dim % 2 or dim < 2:
        raise ConfigError(f"{fields.path}: partial_rotary_factor ({share}) must leave an even part of a head.")
    if kind == "default":
        return Rope(theta, dim)
    max_positions = fields.count("max_position_embeddings", 2048)
    if kind == "linear":
        return Rope(theta, dim, kind, rope.number("factor"))
    if kind == "dynamic":
        return Rope(theta, dim, kind, rope.number("factor"), original_max_positions=max_positions)
    # Phi-3 has it outside.
    original = fields.count(
        "original_max_position_embeddings", rope.count("original_max_position_embeddings", max_positions)
    )
    if kind == "llama3":
        return _llama3(rope, theta, dim, original)
    factor = rope.number("factor", max_positions / original)
    return (_yarn if kind == "yarn" else _longrope)(rope, theta, dim, original, factor)


def _llama3(rope: Fields, theta: float, dim: int, original: int) -> Rope:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"{rope.path}: high_freq_factor ({high}) must be greater than low_freq_factor ({low}).")
    return Rope(
        theta,
        dim,
        "llama3",
        rope.number("factor"),
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Fields, theta: float, dim: int, original: int, factor: float) -> Rope:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    over, under = rope.number_or_none("mscale"), rope.number_or_none("mscale_all_dim")
    amplitude = grown(over) / grown(under) if over and under else grown(1.0)
    return Rope(
        theta,
        dim,
        "yarn",
        factor,
        rope.number("attention_factor", amplitude),
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Fields, theta: float, dim: int, original: int, factor: float) -> Rope:
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 and original > 1 else 1.0
    return Rope(
        theta,
        dim,
        "longrope",
        factor,
        rope.number("attention_factor", amplitude),
        original,
        short_factors=rope.numbers("short_factor", dim // 2),
        long_factors=rope.numbers("long_factor", dim // 2),
    )
