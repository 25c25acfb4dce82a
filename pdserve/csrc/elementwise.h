// Norms, activation, and rotation with the write into the pool: one pass over memory each.
#pragma once

#include "common.h"

// row <- row / rms(row) * weight; the mean is taken in float32.
template <class T>
PDS_INLINE void norm_row(T* out, const T* x, const T* weight, int hidden, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < hidden; i++) sum += to_float(x[i]) * to_float(x[i]);
  const float scale = 1.0f / __builtin_sqrtf(sum / hidden + eps);
#pragma omp simd
  for (int i = 0; i < hidden; i++) out[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
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
#pragma omp simd
    for (int i = 0; i < hidden; i++) to[i] = from_float<T>(to_float(to[i]) + to_float(from[i]));
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
#pragma omp simd
    for (int i = 0; i < inter; i++) {
      const float g = to_float(gate[i]);
      // Below -87 the denominator would leave the range of exp2_fast; silu is 0 there to within 1e-36.
      const float exponent = g < -87.0f ? 87.0f : -g;
      to[i] = from_float<T>(g * reciprocal(1.0f + exp2_fast(exponent * LOG2_E)) * to_float(up[i]));
    }
  }
}

template <class T>
PDS_INLINE void rotate(T* head, const float* cos, const float* sin, int half) {
#pragma omp simd
  for (int i = 0; i < half; i++) {
    const float first = to_float(head[i]), second = to_float(head[half + i]);
    head[i] = from_float<T>(first * cos[i] - second * sin[i]);
    head[half + i] = from_float<T>(second * cos[i] + first * sin[i]);
  }
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
