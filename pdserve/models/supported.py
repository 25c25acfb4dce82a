"""What can be served, said from the tables that decide it; `docs/models.md` holds the same."""

from __future__ import annotations

from pdserve.kernel_limits import HEAD_DIM_STEP, MAX_GROUP, MAX_HEAD_DIM
from pdserve.models.config import ACTIVATIONS
from pdserve.models.families import FAMILIES, Family
from pdserve.models.gguf_types import TENSOR_TYPES
from pdserve.models.rope_config import ROPE_KINDS

_ROPE_TEXTS = {
    "default": "",
    "linear": "all frequencies divided by a factor",
    "dynamic": "as default up to max_position_embeddings; beyond, stretched for --max-model-len",
    "llama3": "Llama 3.1 and later",
    "yarn": "with attention_factor, mscale, beta_fast, beta_slow, truncate",
    "longrope": "short factors, or long ones where --max-model-len is beyond the trained length",
}


def supported() -> dict[str, dict[str, str]]:
    """Section -> entry -> what there is to say of it."""
    return {
        "families": {architecture: _family(family) for architecture, family in FAMILIES.items()},
        "rotations": {kind: _ROPE_TEXTS[kind] for kind in ROPE_KINDS},
        "activations": dict.fromkeys(ACTIVATIONS, ""),
        "sources": {
            "folder": "config.json, tokenizer.json, *.safetensors (BF16, F16, F32), whole or with an index",
            "file.gguf": f"one file, not split; {', '.join(TENSOR_TYPES)}",
            "ORG/NAME": "from a Hugging Face hub, where one is reachable",
        },
        "weights": {
            "dense": "in the dtype of the KV, the default",
            "int8": "8 bits and a scale for each 32 columns of a row, 8.5 bits a weight",
            "int4": "4 bits, a scale and a least value for each 32 columns, 5 bits a weight; the embeddings in 8",
            "gguf": "as the GGUF file has them: Q8_0, Q4_0, Q4_1, Q4_K in their bits, 5 and 6 bits in 8",
        },
        "limits": {
            "native kernels": f"head_dim a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, up to {MAX_GROUP} heads a"
            " kv head; other models run on the reference kernels",
            "windows": "tokens outside a sliding window are masked; their blocks are kept",
            "not supported": "images and audio, encoders, weights quantised in other forms than"
            " GGUF's, pickled weights",
        },
    }


def _family(family: Family) -> str:
    """What people call its models, and what of it differs from Llama."""
    options = family.options
    traits = {
        "q/k norm": family.qk_norm is not None,
        "bias of q, k, v": family.qkv_bias,
        "fused projections": family.fused,
        "sliding window": "sliding_window" in options,
        "layers without rotation": "no_rope_layers" in options,
        "norms before and after": len(family.norms) == 4,
        "norms after": "attention_norm" not in family.norms,
        "(1 + w) norms": family.norm_offset == 1.0,
        "scaled embeddings": family.embedding_scaled,
        "capped scores and logits": "attn_logit_softcapping" in options,
        "two rotations": "rope_local_base_freq" in options,
        "multipliers": "residual_multiplier" in options,
        "mixture of experts": family.experts is not None,
        "a shared expert": "shared_expert_intermediate_size" in options,
    }
    named = ", ".join(trait for trait, has in traits.items() if has)
    return f"{family.models}: {named}" if named else family.models
