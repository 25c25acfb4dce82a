// A vector register of floats in the compiler's own vector type, and the functions that softmax and activations need.
#pragma once

#include <type_traits>

#include "common.h"

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

// If one is not a number, the second is the result. By intrinsic, because of the vector type gcc makes two
// instructions.
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

constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 126, to about 2e-7 relative; x below -126 counts as -126. V is float (branch-free, so that loops over it
// become vector code) or Floats.
template <class V>
PDS_INLINE V exp2_fast(V x) {
  using I = typename IntegersOf<V>::type;
  const V clamped = max_of(V{} - 126.0f, x);
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

// e^x for x in [-86, 0], to about 1e-7 relative.
template <class V>
PDS_INLINE V exp_negative(V x) {
  using I = typename IntegersOf<V>::type;
  const V shifted = x * LOG2_E + 12582912.0f;
  const V n = shifted - 12582912.0f;
  // ln 2 in two parts: n times the first is exact.
  const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  V p = V{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return __builtin_bit_cast(V, __builtin_bit_cast(I, p) + (__builtin_bit_cast(I, shifted) << 23));
}

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

// Stands for minus infinity in running maxima: a difference of two of them is 0, not NaN.
constexpr float LOWEST = -1e30f;

PDS_INLINE Floats load_floats(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
PDS_INLINE float largest_lane(Floats x) {
#if PDS_AVX512_BF16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = max_of(x[i], most);
  return most;
#endif
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

// scores[i] <- tanh(scores[i] * inner) * outer, for `count` a multiple of LANES. tanh(x) is 1 - 2 / (1 + e^2x).
PDS_INLINE void soften(float* scores, int count, float inner, float outer) {
  for (int i = 0; i < count; i += LANES) {
    const Floats x = load_floats(scores + i) * inner;
    const Floats power = exp2_fast(min_of(x * (2.0f * LOG2_E), Floats{} + 125.0f));
    store_floats(scores + i, (1.0f - 2.0f * reciprocal(1.0f + power)) * outer);
  }
}
