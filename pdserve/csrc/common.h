// Types that all kernels share: elements and their conversion, the batch, the paged pool, scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define PDS_AVX512_BF16 1
#include <immintrin.h>
#endif

#if defined(PDS_AVX512_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define PDS_AMX 1
#endif

// Before loops over arrays that are meant to be registers: gcc keeps an array in memory unless it sees constant indices.
#define PDS_UNROLL _Pragma("GCC unroll 32")

#define PDS_INLINE inline __attribute__((always_inline))

// A brain float: the upper half of a float. Arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

PDS_INLINE float to_float(float x) { return x; }
PDS_INLINE float to_float(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
PDS_INLINE float from_float<float>(float x) {
  return x;
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
PDS_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return bf16{static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// A vector register of floats, in the compiler's own vector type.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

template <class V>
struct IntegersOf;
template <>
struct IntegersOf<float> {
  using type = int32_t;
};
template <>
struct IntegersOf<Floats> {
  using type = Integers;
};

// Of the vector type, gcc makes a comparison and a blend where one instruction would do.
template <class V>
PDS_INLINE V min_of(V a, V b) {
#if PDS_AVX512_BF16
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#endif
  return a < b ? a : b;
}
template <class V>
PDS_INLINE V max_of(V a, V b) {
#if PDS_AVX512_BF16
  if constexpr (std::is_same_v<V, Floats>) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

// 2^x for x <= 126, to about 2e-7 relative; x below -126 counts as -126. V is float (branch-free, so that loops over it
// become vector code) or Floats.
template <class V>
PDS_INLINE V exp2_fast(V x) {
  using I = typename IntegersOf<V>::type;
  const V clamped = max_of(x, V{} - 126.0f);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  const V shifted = clamped + 12582912.0f;
  const V f = clamped - (shifted - 12582912.0f);  // in [-0.5, 0.5]: the Taylor series of 2^f
  V p = V{} + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return __builtin_bit_cast(V, __builtin_bit_cast(I, p) + (__builtin_bit_cast(I, shifted) << 23));
}

// Limits that Python checks before it calls.
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_GROUP = 64;  // query heads of one kv head

// 1 / x for x in [1, 2^126], to about 1e-7 relative: a guess from the bits and three steps of Newton, in less time than
// a division of vectors takes.
template <class V>
PDS_INLINE V reciprocal(V x) {
  using I = typename IntegersOf<V>::type;
  V y = __builtin_bit_cast(V, 0x7ef311c7 - __builtin_bit_cast(I, x));
  y *= 2.0f - x * y;
  y *= 2.0f - x * y;
  return y * (2.0f - x * y);
}

constexpr float LOG2_E = 1.44269504f;
// Stands for minus infinity in running maxima: a difference of two of them is 0, not NaN.
constexpr float LOWEST = -1e30f;

// pdserve.kernels.base.Batch, and its sizes.
struct Batch {
  const int32_t* positions;     // [tokens]
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_len;   // [sequences]
  const int32_t* block_tables;  // [sequences, max_blocks]
  int32_t tokens;
  int32_t sequences;
  int32_t max_blocks;
  int32_t max_query_len;
};

inline int sequence_of(const Batch& batch, int token) {
  return static_cast<int>(std::upper_bound(batch.query_start, batch.query_start + batch.sequences + 1, token) -
                          batch.query_start) - 1;
}

// `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`; strides in elements.
struct Pool {
  void* data;
  int64_t block_stride;
  int64_t head_stride;
  int32_t num_blocks;
  int32_t kv_heads;
  int32_t layers;
  int32_t block_size;
  int32_t head_dim;
};

// The pool as one (kv head, layer) of one sequence sees it.
template <class T>
struct PagedKv {
  const T* base;
  const int32_t* table;
  int64_t block_stride;
  int64_t value_offset;  // from a key to its value
  int32_t block_size;
  int32_t head_dim;

  PagedKv(const Pool& pool, const Batch& batch, int sequence, int head, int layer)
      : base(static_cast<const T*>(pool.data) + head * pool.head_stride +
             int64_t{2} * layer * pool.block_size * pool.head_dim),
        table(batch.block_tables + int64_t{sequence} * batch.max_blocks),
        block_stride(pool.block_stride),
        value_offset(int64_t{pool.block_size} * pool.head_dim),
        block_size(pool.block_size),
        head_dim(pool.head_dim) {}

  // Keys of consecutive tokens are contiguous within a block: the address of `token` and how many follow it there.
  PDS_INLINE const T* key(int token) const {
    return base + table[token / block_size] * block_stride + int64_t{token % block_size} * head_dim;
  }
  PDS_INLINE int run(int token) const { return block_size - token % block_size; }
};

// This thread's T. Not inlined: the address of thread-local storage would be looked up at every use.
template <class T>
__attribute__((noinline)) T& of_this_thread() {
  static thread_local T object;
  return object;
}

// Memory of one thread that grows to what was asked for and is reused; 64-byte aligned.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(size_t count) {
    const size_t need = (count * sizeof(T) + 63) / 64 * 64;
    if (need > bytes_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, need);
      if (data_ == nullptr) std::abort();
      bytes_ = need;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

PDS_INLINE Floats load_floats(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
PDS_INLINE void store_floats(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// One element, or LANES of them, as V: float or Floats.
template <class V, class T>
PDS_INLINE V load_as(const T* from) {
  if constexpr (std::is_same_v<V, float>) {
    return to_float(*from);
  } else if constexpr (std::is_same_v<T, float>) {
    return load_floats(from);
  } else {
#if PDS_AVX512_BF16
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_bit_cast(Floats, __builtin_convertvector(halves, Integers) << 16);
#endif
  }
}

template <class V, class T>
PDS_INLINE void store_as(T* to, V x) {
  if constexpr (std::is_same_v<V, float>) {
    *to = from_float<T>(x);
  } else if constexpr (std::is_same_v<T, float>) {
    store_floats(to, x);
  } else {
#if PDS_AVX512_BF16
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &narrow, sizeof narrow);
#else
    for (int i = 0; i < LANES; i++) to[i] = from_float<T>(x[i]);
#endif
  }
}

// body(i, V{}) for all i in [0, count): LANES at a time with V = Floats, and what is left one by one with V = float.
template <class Body>
PDS_INLINE void for_lanes(int count, Body body) {
  int i = 0;
  for (; i + LANES <= count; i += LANES) body(i, Floats{});
  for (; i < count; i++) body(i, 0.0f);
}

PDS_INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }
PDS_INLINE int smaller(int a, int b) { return a < b ? a : b; }
PDS_INLINE int larger(int a, int b) { return a > b ? a : b; }
