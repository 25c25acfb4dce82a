// The C interface: pdserve/kernels/native.py declares the same. Sizes and alignments are checked there.

#include <type_traits>
#include <vector>

#include "decode.h"
#include "decode_amx.h"
#include "decode_bf16.h"
#include "decode_plain.h"
#include "elementwise.h"
#include "linear.h"
#include "linear_amx.h"
#include "linear_quantised.h"
#include "prefill.h"
#include "sampler.h"

namespace {

enum Feature { AVX512_BF16 = 1, AMX = 2 };

bool amx_ready = false;

// The arguments of an attention kernel.
template <class T>
struct Attention {
  T* out;
  const T* qkv;
  const Batch& batch;
  const Pool& pool;
  Shape shape;
  int threads;

  template <class Products>
  void decode(const std::vector<int>& sequences) const {
    Decode<T, Products>(out, qkv, batch, pool, shape).run(sequences, threads);
  }
  template <class Chunk>
  void prefill(const std::vector<int>& sequences) const {
    Prefill<T, Chunk>(out, qkv, batch, pool, shape).run(sequences, threads);
  }
};

template <int DIM>
void decode_of_dim(const Attention<float>& attention, const std::vector<int>& sequences) {
  attention.decode<PlainProducts<float, DIM>>(sequences);
}

template <int DIM>
void decode_of_dim(const Attention<bf16>& attention, const std::vector<int>& sequences) {
#if PDS_AMX
  if constexpr (DIM != 0) {
    if (amx_ready && attention.pool.block_size % 16 == 0) return attention.decode<AmxProducts<DIM>>(sequences);
  }
#endif
#if PDS_AVX512_BF16
  if constexpr (DIM != 0) return attention.decode<Bf16Products<DIM>>(sequences);
#endif
  attention.decode<PlainProducts<bf16, DIM>>(sequences);
}

template <class T>
void decode(const Attention<T>& attention, const std::vector<int>& sequences) {
  switch (attention.pool.head_dim) {
    case 64: return decode_of_dim<64>(attention, sequences);
    case 128: return decode_of_dim<128>(attention, sequences);
    case 256: return decode_of_dim<256>(attention, sequences);
    default: return decode_of_dim<0>(attention, sequences);
  }
}

template <class T>
void prefill(const Attention<T>& attention, const std::vector<int>& sequences) {
#if PDS_AVX512_BF16
  if constexpr (std::is_same_v<T, bf16>) {
    if (attention.pool.head_dim % 32 == 0) {
#if PDS_AMX
      if (amx_ready) return attention.template prefill<AmxChunk>(sequences);
#endif
      return attention.template prefill<Bf16Chunk>(sequences);
    }
  }
#endif
  attention.template prefill<PlainChunk<T>>(sequences);
}

template <class T>
void attend(const Attention<T>& attention) {
  const Batch& batch = attention.batch;
  std::vector<int> decodes, prefills;
  for (int s = 0; s < batch.sequences; s++) {
    const int rows = batch.query_start[s + 1] - batch.query_start[s];
    if (rows > 0) (rows == 1 ? decodes : prefills).push_back(s);
  }
  if (!decodes.empty()) decode(attention, decodes);
  if (!prefills.empty()) prefill(attention, prefills);
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

#define PDS_KERNELS(T, NAME)                                                                                       \
  PDS_EXPORT void pds_rms_norm_##NAME(T* out, const T* x, const T* weight, int rows, int hidden, float eps,        \
                                      float offset, int threads) {                                                 \
    rms_norm(out, x, NormWeight<T>{weight, offset, eps}, rows, hidden, threads);                                   \
  }                                                                                                                \
  PDS_EXPORT void pds_add_rms_norm_##NAME(T* out, const T* x, T* residual, const T* weight, int rows, int hidden,  \
                                          float eps, float offset, int threads) {                                  \
    add_rms_norm(out, x, residual, NormWeight<T>{weight, offset, eps}, rows, hidden, threads);                     \
  }                                                                                                                \
  PDS_EXPORT void pds_norm_slices_##NAME(T* x, const T* weight, int rows, int width, int begin, int count,         \
                                         int size, float eps, float offset, int threads) {                         \
    norm_slices(x, NormWeight<T>{weight, offset, eps}, rows, width, begin, count, size, threads);                  \
  }                                                                                                                \
  PDS_EXPORT void pds_silu_and_mul_##NAME(T* out, const T* x, int rows, int inter, int threads) {                  \
    activate_and_mul<Silu>(out, x, rows, inter, threads);                                                          \
  }                                                                                                                \
  PDS_EXPORT void pds_gelu_and_mul_##NAME(T* out, const T* x, int rows, int inter, int threads) {                  \
    activate_and_mul<GeluTanh>(out, x, rows, inter, threads);                                                      \
  }                                                                                                                \
  /* 0, and nothing done, where a position lies outside the table of max_position rows. */                         \
  PDS_EXPORT int pds_rope_append_##NAME(T* qkv, const float* cos_sin, int max_position, int rotary,                \
                                        const Batch* batch, const Pool* pool, int layer, int heads, int threads) { \
    for (int t = 0; t < batch->tokens; t++) {                                                                      \
      if (batch->positions[t] < 0 || batch->positions[t] >= max_position) return 0;                                \
    }                                                                                                              \
    rope_append(qkv, cos_sin, rotary, *batch, *pool, layer, heads, threads);                                       \
    return 1;                                                                                                      \
  }                                                                                                                \
  PDS_EXPORT void pds_attention_##NAME(T* out, const T* qkv, const Batch* batch, const Pool* pool, int layer,      \
                                       int heads, float scale, int window, float softcap, int threads) {           \
    attend(Attention<T>{out, qkv, *batch, *pool, Shape{layer, heads, scale, softcap, window}, threads});           \
  }                                                                                                                \
  PDS_EXPORT void pds_linear_int8_##NAME(T* out, const T* x, const uint8_t* w, const _Float16* scales,             \
                                         const T* bias, int rows, int n, int k, int threads) {                     \
    linear_quantised<T, 8>(QuantisedArgs<T>{out, x, w, scales, bias, rows, n, k}, threads);                        \
  }                                                                                                                \
  PDS_EXPORT void pds_linear_int4_##NAME(T* out, const T* x, const uint8_t* w, const _Float16* scales,             \
                                         const T* bias, int rows, int n, int k, int threads) {                     \
    linear_quantised<T, 4>(QuantisedArgs<T>{out, x, w, scales, bias, rows, n, k}, threads);                        \
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

// tokens [count]; 0 where a row has a token id that lies outside the vocabulary.
PDS_EXPORT int pds_choose(const SamplingRow* rows, int count, int vocab, int64_t* tokens, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < count; r++) tokens[r] = choose(rows[r], vocab);
  return std::none_of(tokens, tokens + count, [](int64_t token) { return token < 0; });
}

// logits [rows, vocab], tokens [rows] in it -> logprobs and ranks [rows], top_ids and top_logprobs [rows, num_top].
PDS_EXPORT void pds_describe(const float* logits, const int64_t* tokens, int rows, int vocab, int num_top,
                             float* logprobs, int32_t* ranks, int32_t* top_ids, float* top_logprobs, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) {
    const int64_t top = int64_t{r} * num_top;
    const Description into{logprobs + r, ranks + r, top_ids + top, top_logprobs + top};
    describe(logits + int64_t{r} * vocab, vocab, tokens[r], num_top, into);
  }
}
