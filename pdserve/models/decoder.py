"""The decoder: token ids of a batch in, hidden states and logits out, KV appended to the pool on the way.

Pre-norm transformer with rotary attention and a gated MLP (Llama, arXiv 2302.13971). All but the look-up of embeddings
goes through the kernel seam.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from pdserve.kernels.base import Batch, Kernels
from pdserve.models.config import ModelConfig
from pdserve.models.rope import rope_table
from pdserve.models.weights import Weights


class Decoder:
    """One model on one device; stateless between calls, so any batch may follow any other.

    Args:
        max_positions: positions that sequences may reach; sizes the rotary table.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels, max_positions: int) -> None:
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self._cos_sin = rope_table(config, max_positions).to(weights.embedding.device)
        self._scale = config.head_dim**-0.5
        # The norm that follows layer i is that of layer i + 1, fused with the residual add of layer i.
        self._next_norms = (*(layer.attention_norm for layer in weights.layers[1:]), weights.final_norm)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, batch: Batch, pool: Tensor) -> Tensor:
        """Compute the tokens of `batch` and append their KV to the pool.

        Args:
            token_ids: [T] int32 or int64, in [0, vocab_size).
            pool: [num_blocks, kv_heads, layers, 2, block_size, head_dim] in the dtype of the weights.

        Returns:
            Hidden states after the final norm, [T, hidden].
        """
        kernels, eps, num_heads = self.kernels, self.config.rms_eps, self.config.num_heads
        linear = kernels.linear
        residual = embedding(token_ids, self.weights.embedding)
        x = kernels.rms_norm(residual, self.weights.layers[0].attention_norm, eps)
        for i, (layer, next_norm) in enumerate(zip(self.weights.layers, self._next_norms, strict=True)):
            qkv = linear(x, layer.qkv, layer.qkv_bias)
            kernels.rope_append(qkv, self._cos_sin, batch, pool, i, num_heads)
            attended = kernels.attention(qkv, batch, pool, i, num_heads, self._scale)
            x = linear(attended, layer.output, layer.output_bias)
            x = kernels.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = kernels.silu_and_mul(linear(x, layer.gate_up, layer.gate_up_bias))
            x = linear(x, layer.down, layer.down_bias)
            x = kernels.add_rms_norm(x, residual, next_norm, eps)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `forward`'s result, [R, hidden] -> [R, vocab] float32."""
        return self.kernels.linear(hidden, self.weights.head).float()
