// Norms, activation, and rotation with the write into the pool: one pass over memory each.
#pragma once

#include "paged.h"
#include "vector.h"

// out <- x / rms(x) * weight; the mean is taken in float.
template <class T>
PDS_INLINE void norm_row(T* out, const T* x, const T* weight, int hidden, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < hidden; i++) sum += to_float(x[i]) * to_float(x[i]);
  const float scale = 1.0f / __builtin_sqrtf(sum / hidden + eps);
  for_lanes(hidden, [=](int i, auto v) {
    using V = decltype(v);
    store_as<V>(out + i, load_as<V>(x + i) * scale * load_as<V>(weight + i));
  });
}

template <class T>
void rms_norm(T* out, const T* x, const T* weight, int rows, int hidden, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) norm_row(out + int64_t{r} * hidden, x + int64_t{r} * hidden, weight, hidden, eps);
}

template <class T>
void add_rms_norm(T* out, const T* x, T* residual, const T* weight, int rows, int hidden, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) {
    const T* from = x + int64_t{r} * hidden;
    T* to = residual + int64_t{r} * hidden;
    for_lanes(hidden, [=](int i, auto v) {
      using V = decltype(v);
      store_as<V>(to + i, load_as<V>(to + i) + load_as<V>(from + i));
    });
    norm_row(out + int64_t{r} * hidden, to, weight, hidden, eps);
  }
}

template <class T>
void silu_and_mul(T* out, const T* x, int rows, int inter, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int r = 0; r < rows; r++) {
    const T* gate = x + int64_t{r} * 2 * inter;
    const T* up = gate + inter;
    T* to = out + int64_t{r} * inter;
    for_lanes(inter, [=](int i, auto v) {
      using V = decltype(v);
      const V g = load_as<V>(gate + i);
      // 2^125 is as good as infinity: silu is 0 there to within 1e-35.
      const V sigmoid = reciprocal(1.0f + exp2_fast(min_of(g * -LOG2_E, V{} + 125.0f)));
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

template <class T>
void rope_append(T* qkv, const float* cos_sin, const Batch& batch, const Pool& pool, int layer, int heads,
                 int threads) {
  const int kv_heads = pool.kv_heads, dim = pool.head_dim, half = dim / 2;
  const int64_t width = int64_t{heads + 2 * kv_heads} * dim;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int t = 0; t < batch.tokens; t++) {
    const int s = sequence_of(batch, t);
    const int position = batch.context_len[s] - batch.query_start[s + 1] + t;
    T* row = qkv + t * width;
    const float* cos = cos_sin + int64_t{batch.positions[t]} * dim;
    for (int h = 0; h < heads + kv_heads; h++) rotate(row + h * dim, cos, cos + half, half);
    for (int h = 0; h < kv_heads; h++) {
      const PagedKv<T> kv(pool, batch, s, h, layer);
      T* key = const_cast<T*>(kv.key(position));
      std::memcpy(key, row + (heads + h) * dim, dim * sizeof(T));
      std::memcpy(key + kv.value_offset, row + (heads + kv_heads + h) * dim, dim * sizeof(T));
    }
  }
}
