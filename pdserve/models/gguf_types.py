"""What of GGUF files can be read; light, for `pdserve models`."""

from __future__ import annotations

from pdserve.models.families import FAMILIES

# Of tensors, under the names of the `gguf` package. The K types are what files called Q4_K_M and so on are made of.
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

# `general.architecture` to ours. A Mistral file says llama, so its window is lost: it does not hold one.
ARCHITECTURES: dict[str, str] = {}
for _name, _family in FAMILIES.items():
    if _family.gguf:
        ARCHITECTURES.setdefault(_family.gguf, _name)
