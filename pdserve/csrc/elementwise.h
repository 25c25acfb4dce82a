// Norms, activation, and rotation with the write into the pool: one pass over memory each.
#pragma once

#include "paged.h"
#include "vector.h"

// The weights of a norm, and what is added to each of them.
template <class T>
struct NormWeight {
  const T* weight;
  float offset;
  float eps;
};

// out <- x / rms(x) * (offset + weight); the mean is taken in float. In place where out is x.
template <class T>
PDS_INLINE void norm_row(T* out, const T* x, NormWeight<T> norm, int hidden) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < hidden; i++) sum += to_float(x[i]) * to_float(x[i]);
  const float scale = 1.0f / __builtin_sqrtf(sum / hidden + norm.eps);
  for_lanes(hidden, [=](int i, auto v) {
    using V = decltype(v);
    store_as<V>(out + i, load_as<V>(x + i) * scale * (load_as<V>(norm.weight + i) + norm.offset));
  });
}

template <class T>
void rms_norm(T* out, const T* x, NormWeight<T> norm, int rows, int hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) norm_row(out + int64_t{r} * hidden, x + int64_t{r} * hidden, norm, hidden);
}

// In place: `count` slices of each row of x [rows, width], each of `size`, the first at column `begin`.
template <class T>
void norm_slices(T* x, NormWeight<T> norm, int rows, int width, int begin, int count, int size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) {
    T* slice = x + int64_t{r} * width + begin;
    for (int i = 0; i < count; i++, slice += size) norm_row(slice, slice, norm, size);
  }
}

template <class T>
void add_rms_norm(T* out, const T* x, T* residual, NormWeight<T> norm, int rows, int hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) {
    const T* from = x + int64_t{r} * hidden;
    T* to = residual + int64_t{r} * hidden;
    for_lanes(hidden, [=](int i, auto v) {
      using V = decltype(v);
      store_as<V>(to + i, load_as<V>(to + i) + load_as<V>(from + i));
    });
    norm_row(out + int64_t{r} * hidden, to, norm, hidden);
  }
}

// Both activations are x * sigmoid(inner(x)).
struct Silu {
  template <class V>
  static PDS_INLINE V inner(V x) {
    return x;
  }
};
// x / 2 * (1 + tanh(y)) with y = sqrt(2 / pi) * (x + 0.044715 x^3) is x * sigmoid(2 y).
struct GeluTanh {
  template <class V>
  static PDS_INLINE V inner(V x) {
    return x * (1.5957691216f + 0.0713548163f * x * x);
  }
};

template <class Activation, class T>
void activate_and_mul(T* out, const T* x, int rows, int inter, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) {
    const T* gate = x + int64_t{r} * 2 * inter;
    const T* up = gate + inter;
    T* to = out + int64_t{r} * inter;
    for_lanes(inter, [=](int i, auto v) {
      using V = decltype(v);
      const V g = load_as<V>(gate + i);
      // 2^125 is as good as infinity: the result is 0 there to within 1e-35.
      const V sigmoid = reciprocal(1.0f + exp2_fast(min_of(Activation::inner(g) * -LOG2_E, V{} + 125.0f)));
      store_as<V>(to + i, g * sigmoid * load_as<V>(up + i));
    });
  }
}

template <class T>
PDS_INLINE void rotate(T* head, const float* cos, const float* sin, int half) {
  for_lanes(half, [=](int i, auto v) {
    using V = decltype(v);
    const V first = load_as<V>(head + i), second = load_as<V>(head + half + i);
    const V c = load_as<V>(cos + i), s = load_as<V>(sin + i);
    store_as<V>(head + i, first * c - second * s);
    store_as<V>(head + half + i, second * c + first * s);
  });
}

// cos_sin [position, rotary]: the first `rotary` elements of a head are rotated.
template <class T>
void rope_append(T* qkv, const float* cos_sin, int rotary, const Batch& batch, const Pool& pool, int layer, int heads,
                 int threads) {
  const int kv_heads = pool.kv_heads, dim = pool.head_dim, half = rotary / 2;
  const int64_t width = int64_t{heads + 2 * kv_heads} * dim;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int t = 0; t < batch.tokens; t++) {
    const int s = sequence_of(batch, t);
    const int position = batch.context_len[s] - batch.query_start[s + 1] + t;
    T* row = qkv + t * width;
    const float* cos = cos_sin + int64_t{batch.positions[t]} * rotary;
    for (int h = 0; h < heads + kv_heads; h++) rotate(row + h * dim, cos, cos + half, half);
    for (int h = 0; h < kv_heads; h++) {
      const PagedKv<T> kv(pool, batch, s, h, layer);
      T* key = const_cast<T*>(kv.key(position));
      std::memcpy(key, row + (heads + h) * dim, dim * sizeof(T));
      std::memcpy(key + kv.value_offset, row + (heads + kv_heads + h) * dim, dim * sizeof(T));
    }
  }
}
