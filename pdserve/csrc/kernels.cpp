// The C interface: pdserve/kernels/native.py declares the same. Sizes and alignments are checked there.

#include "common.h"
#include "decode.h"
#include "elementwise.h"
#include "linear.h"
#include "prefill.h"

namespace {

enum Feature { AVX512_BF16 = 1, AMX = 2 };

bool amx_ready = false;

template <class T, int DIM>
void attention(T* out, const T* qkv, const Batch& batch, const Pool& pool, int layer, int heads, float scale,
               int threads) {
  std::vector<int> decodes, prefills;
  for (int s = 0; s < batch.sequences; s++) {
    const int rows = batch.query_start[s + 1] - batch.query_start[s];
    if (rows > 0) (rows == 1 ? decodes : prefills).push_back(s);
  }
  if (!decodes.empty()) Decode<T, DIM>(out, qkv, batch, pool, layer, heads, scale).run(decodes, threads);
  if (prefills.empty()) return;
#if PDS_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    if (amx_ready && pool.head_dim % 32 == 0) {
      Prefill<T, AmxChunk>(out, qkv, batch, pool, layer, heads, scale).run(prefills, threads);
      return;
    }
  }
#endif
  Prefill<T, PlainChunk<T>>(out, qkv, batch, pool, layer, heads, scale).run(prefills, threads);
}

template <class T>
void attention_of_dim(T* out, const T* qkv, const Batch& batch, const Pool& pool, int layer, int heads, float scale,
                      int threads) {
  switch (pool.head_dim) {
    case 64: return attention<T, 64>(out, qkv, batch, pool, layer, heads, scale, threads);
    case 128: return attention<T, 128>(out, qkv, batch, pool, layer, heads, scale, threads);
    default: return attention<T, 0>(out, qkv, batch, pool, layer, heads, scale, threads);
  }
}

}  // namespace

#define PDS_EXPORT extern "C" __attribute__((visibility("default")))

// Call once before any other function; returns the Features in use.
PDS_EXPORT int pds_init() {
  int features = 0;
#if PDS_AVX512_BF16
  features |= AVX512_BF16;
#endif
#if PDS_AMX
  amx_ready = amx_request();
  if (amx_ready) features |= AMX;
#endif
  return features;
}

// Whether every index of the batch stays inside the pool: the one guard between a bug of ours and foreign memory.
PDS_EXPORT int pds_batch_fits(const Batch* batch, const Pool* pool) {
  const Batch& b = *batch;
  if (b.query_start[0] != 0 || b.query_start[b.sequences] != b.tokens) return 0;
  for (int s = 0; s < b.sequences; s++) {
    const int rows = b.query_start[s + 1] - b.query_start[s];
    if (rows < 0 || rows > b.context_len[s]) return 0;
    const int blocks = ceil_div(b.context_len[s], pool->block_size);
    if (blocks > b.max_blocks) return 0;
    const int32_t* table = b.block_tables + int64_t{s} * b.max_blocks;
    for (int i = 0; i < blocks; i++) {
      if (table[i] < 0 || table[i] >= pool->num_blocks) return 0;
    }
  }
  return 1;
}

#define PDS_KERNELS(T, NAME)                                                                                         \
  PDS_EXPORT void pds_rms_norm_##NAME(T* out, const T* x, const T* weight, int rows, int hidden, float eps,          \
                                      int threads) {                                                                 \
    rms_norm(out, x, weight, rows, hidden, eps, threads);                                                            \
  }                                                                                                                  \
  PDS_EXPORT void pds_add_rms_norm_##NAME(T* out, const T* x, T* residual, const T* weight, int rows, int hidden,    \
                                          float eps, int threads) {                                                  \
    add_rms_norm(out, x, residual, weight, rows, hidden, eps, threads);                                              \
  }                                                                                                                  \
  PDS_EXPORT void pds_silu_and_mul_##NAME(T* out, const T* x, int rows, int inter, int threads) {                    \
    silu_and_mul(out, x, rows, inter, threads);                                                                      \
  }                                                                                                                  \
  /* 0, and nothing done, where a position lies outside the table of max_position rows. */                           \
  PDS_EXPORT int pds_rope_append_##NAME(T* qkv, const float* cos_sin, int max_position, const Batch* batch,          \
                                        const Pool* pool, int layer, int heads, int threads) {                       \
    for (int t = 0; t < batch->tokens; t++) {                                                                        \
      if (batch->positions[t] < 0 || batch->positions[t] >= max_position) return 0;                                  \
    }                                                                                                                \
    rope_append(qkv, cos_sin, *batch, *pool, layer, heads, threads);                                                 \
    return 1;                                                                                                        \
  }                                                                                                                  \
  PDS_EXPORT void pds_attention_##NAME(T* out, const T* qkv, const Batch* batch, const Pool* pool, int layer,        \
                                       int heads, float scale, int threads) {                                        \
    attention_of_dim(out, qkv, *batch, *pool, layer, heads, scale, threads);                                         \
  }

PDS_KERNELS(bf16, bf16)
PDS_KERNELS(float, f32)

// Only where pds_init reports AVX512_BF16.
PDS_EXPORT void pds_linear_bf16(bf16* out, const bf16* x, const bf16* w, const bf16* bias, int rows, int n, int k,
                                int threads) {
#if PDS_AVX512_BF16
  const LinearArgs args{out, x, w, bias, rows, n, k};
#if PDS_AMX
  if (amx_ready) return linear_amx(args, threads);
#endif
  linear_dots(args, threads);
#else
  std::abort();
#endif
}
