"""The decoder: token ids of a batch in, hidden states and logits out, KV appended to the pool on the way.

A transformer with rotary attention and a gated MLP (Llama, arXiv 2302.13971). How a family differs from that is in the
config's numbers and in which weights there are. All but the look-up of embeddings goes through the kernel seam.
"""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor
from torch.nn.functional import embedding

from pdserve.kernels.base import AttentionKind, Batch, Kernels
from pdserve.kernels.quantised import QuantisedWeight
from pdserve.models.config import ModelConfig
from pdserve.models.experts import mix
from pdserve.models.rope import rope_table
from pdserve.models.weights import LayerWeights, Weights


class Decoder:
    """One model on one device; stateless between calls, so any batch may follow any other.

    Args:
        max_positions: positions that sequences may reach; sizes the rotary tables.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels, max_positions: int) -> None:
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self._max_positions = max_positions
        tables = [rope_table(rope, max_positions).to(weights.final_norm.device) for rope in config.ropes]
        unrotated = tables[0][:, :0].contiguous()
        self._cos_sin = [unrotated if layer.rope is None else tables[layer.rope] for layer in config.layers]
        scale, softcap = config.attention_scale, config.attention_softcap or 0.0
        self._kinds = [AttentionKind(config.num_heads, scale, layer.window or 0, softcap) for layer in config.layers]
        self._activate = kernels.silu_and_mul if config.activation == "silu" else kernels.gelu_and_mul
        # The norm that follows layer i is that of layer i + 1, fused with the residual add of layer i.
        self._next_norms = (*(layer.attention_norm for layer in weights.layers[1:]), weights.final_norm)

    @property
    def kv_identity(self) -> str:
        """Names the KV that a sequence of tokens gets; equal where two decoders can use each other's."""
        stretches = [rope.stretches_at(self._max_positions) for rope in self.config.ropes]
        if not any(stretches):
            return self.weights.identity
        return sha256(f"{self.weights.identity} {stretches}".encode()).hexdigest()

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, batch: Batch, pool: Tensor) -> Tensor:
        """Compute the tokens of `batch` and append their KV to the pool.

        Args:
            token_ids: [T] int32 or int64, in [0, vocab_size).
            pool: [num_blocks, kv_heads, layers, 2, block_size, head_dim] in the dtype of the weights.

        Returns:
            Hidden states after the final norm, [T, hidden].
        """
        linear = self.kernels.linear
        residual = self._embed(token_ids)
        if self.config.embedding_scale != 1.0:
            residual *= torch.tensor(self.config.embedding_scale).to(residual.dtype)  # rounded as in training
        first = self.weights.layers[0].attention_norm
        x = residual if first is None else self._norm(residual, first)
        for i, (layer, next_norm) in enumerate(zip(self.weights.layers, self._next_norms, strict=True)):
            attended = self._attend(linear(x, layer.qkv, layer.qkv_bias), layer, batch, pool, i)
            x = linear(attended, layer.output, layer.output_bias)
            x = self._add(x, residual, layer.attention_post_norm, layer.mlp_norm)
            x = self._mlp(x, layer)
            x = self._add(x, residual, layer.mlp_post_norm, next_norm)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `forward`'s result, [R, hidden] -> [R, vocab] float32."""
        logits = self.kernels.linear(hidden, self.weights.head).float()
        if self.config.logit_scale != 1.0:
            logits *= self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, hidden]."""
        table = self.weights.embedding
        if isinstance(table, QuantisedWeight):
            return table.rows(token_ids).to(self.weights.final_norm.dtype)
        return embedding(token_ids, table)

    def _attend(self, qkv: Tensor, layer: LayerWeights, batch: Batch, pool: Tensor, i: int) -> Tensor:
        """qkv [T, q_size + 2 kv_size] -> [T, q_size]."""
        kernels, config = self.kernels, self.config
        if layer.q_norm is not None and layer.k_norm is not None:
            q_count, k_count = (config.num_heads, config.num_kv_heads) if config.qk_norm == "head" else (1, 1)
            kernels.norm_slices(qkv, 0, q_count, layer.q_norm, config.rms_eps, config.norm_offset)
            kernels.norm_slices(qkv, config.q_size, k_count, layer.k_norm, config.rms_eps, config.norm_offset)
        kernels.rope_append(qkv, self._cos_sin[i], batch, pool, i, config.num_heads)
        return kernels.attention(qkv, batch, pool, i, self._kinds[i])

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """[T, hidden] -> [T, hidden]: the MLP, or the layer's experts and beside them the shared one."""
        linear, experts = self.kernels.linear, layer.experts
        mixed = None
        if experts is not None:
            assert self.config.experts is not None
            mixed = mix(x, experts, self.config.experts, self._activate)
        if layer.gate_up is None or layer.down is None:
            assert mixed is not None
            return mixed
        share = None if experts is None or experts.shared_gate is None else linear(x, experts.shared_gate).sigmoid()
        own = linear(self._activate(linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
        if share is not None:
            own = own * share
        return own if mixed is None else own + mixed

    def _add(self, x: Tensor, residual: Tensor, post_norm: Tensor | None, next_norm: Tensor | None) -> Tensor:
        """Add what a block gives to the residual; returns what the next block reads. All [T, hidden]."""
        if post_norm is not None:
            x = self._norm(x, post_norm)
        if self.config.residual_scale != 1.0:
            x *= self.config.residual_scale
        if next_norm is not None:
            return self.kernels.add_rms_norm(x, residual, next_norm, self.config.rms_eps, self.config.norm_offset)
        residual += x
        return residual

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, weight, self.config.rms_eps, self.config.norm_offset)
