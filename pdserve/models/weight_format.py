"""How weights are kept and where they come from; light, for the commands that take it as an option."""

from __future__ import annotations

from typing import Literal, get_args

# Dense is in the dtype of the KV; int8 and int4 round in groups of 32; gguf keeps what the GGUF file has.
WeightFormat = Literal["dense", "int8", "int4", "gguf"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
HELP = "int8, int4: rounded to so many bits; gguf: as the GGUF file has them."

LoadFormat = Literal["auto", "dummy"]
LOAD_FORMATS: tuple[LoadFormat, ...] = get_args(LoadFormat)
LOAD_HELP = "dummy: random weights of the shape that config.json gives."
