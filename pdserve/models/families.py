"""The model families, each a row that says how it differs from Llama.

A family's `options` are the fields of its config.json that others do not have, or for which it has another default,
with that default: a file leaves out what equals it. An option that a family does not name is ignored in its files, as
transformers ignores it. What a row does not say is read from the file; another family is one more row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# From the norms of a layer (pdserve.models.weights.LayerWeights) to their names in a checkpoint. Those before a block
# norm what it reads, those after it norm what it adds to the residual.
PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

QkNorm = Literal["head", "projection"]


@dataclass(frozen=True, slots=True)
class Experts:
    """Where a family with experts has them, in its config.json and in its checkpoints."""

    count: str  # field: how many
    size: str  # field: intermediate size of one
    at: str  # of a layer's block of experts, in a checkpoint
    gate: str  # of an expert's projections
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Family:
    """
    Attributes:
        models: what people call its models.
        gguf: `general.architecture` in GGUF files; empty if those are not read.
        gguf_rotates_pairs: its GGUF files store the two elements of a rotated pair next to each other.
        qk_norm: q and k are normed before they are rotated, each head by itself or all heads as one vector.
        qkv_bias: q, k and v always have a bias and the output projection never; else `attention_bias` says it for all.
        fused: the checkpoint holds q, k and v in one tensor, gate and up in one tensor.
        norm_offset: added to the weights of every norm.
        experts: some or all layers have a mixture of experts in place of the MLP.
        embedding_scaled: embeddings are multiplied by the square root of their size.
    """

    models: str
    gguf: str
    options: Mapping[str, object] = field(default_factory=dict)
    gguf_rotates_pairs: bool = False
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    qk_norm: QkNorm | None = None
    qkv_bias: bool = False
    fused: bool = False
    norm_offset: float = 0.0
    embedding_scaled: bool = False
    experts: Experts | None = None


# Windows on some layers, where the file does not list `layer_types`.
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_QWEN_EXPERTS = Experts("num_experts", "moe_intermediate_size", "mlp", "gate_proj", "up_proj", "down_proj")
_QWEN_SPARSE = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("Llama 2, 3.x, SmolLM2", gguf="llama", gguf_rotates_pairs=True),
    "SmolLM3ForCausalLM": Family(
        "SmolLM3",
        gguf="smollm3",
        gguf_rotates_pairs=True,
        options={
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
        },
    ),
    "MistralForCausalLM": Family(
        "Mistral",
        gguf="llama",
        gguf_rotates_pairs=True,
        options={"sliding_window": 4096, "max_position_embeddings": 4096 * 32},
    ),
    "Qwen2ForCausalLM": Family("Qwen2, Qwen2.5", gguf="qwen2", options=_QWEN_WINDOWS, qkv_bias=True),
    "Qwen3ForCausalLM": Family("Qwen3", gguf="qwen3", options={"head_dim": 128, **_QWEN_WINDOWS}, qk_norm="head"),
    "MixtralForCausalLM": Family(
        "Mixtral",
        gguf="",
        options={
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        experts=Experts("num_local_experts", "intermediate_size", "block_sparse_moe", "w1", "w3", "w2"),
    ),
    "Qwen2MoeForCausalLM": Family(
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        gguf="",
        options={
            **_QWEN_WINDOWS,
            **_QWEN_SPARSE,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        qkv_bias=True,
        experts=_QWEN_EXPERTS,
    ),
    "Qwen3MoeForCausalLM": Family(
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        gguf="",
        options={
            "use_sliding_window": False,
            "sliding_window": 4096,
            **_QWEN_SPARSE,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qk_norm="head",
        experts=_QWEN_EXPERTS,
    ),
    "Phi3ForCausalLM": Family(
        "Phi-3, Phi-3.5, Phi-4", gguf="phi3", options={"sliding_window": None, "rms_norm_eps": 1e-5}, fused=True
    ),
    "Gemma2ForCausalLM": Family(
        "Gemma 2",
        gguf="gemma2",
        options={
            **_GEMMA,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norms=SANDWICH_NORMS,
        norm_offset=1.0,
        embedding_scaled=True,
    ),
    "Gemma3ForCausalLM": Family(
        "Gemma 3 (text)",
        gguf="gemma3",
        options={
            **_GEMMA,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        norms=SANDWICH_NORMS,
        qk_norm="head",
        norm_offset=1.0,
        embedding_scaled=True,
    ),
    "Olmo2ForCausalLM": Family(
        "OLMo 2", gguf="olmo2", options={"rms_norm_eps": 1e-5}, norms=POST_NORMS, qk_norm="projection"
    ),
    "GraniteForCausalLM": Family(
        "Granite 3.x",
        gguf="granite",
        gguf_rotates_pairs=True,
        options={
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
}
