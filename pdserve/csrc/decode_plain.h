// The products of decode attention in loops that the compiler turns into vector code: any element type, any machine.
#pragma once

#include "decode_tile.h"

// DIM 0: known at run time only.
template <class T, int DIM>
class PlainProducts {
 public:
  static constexpr int HEADS = 1;  // the output has a multiple of it
  struct Scope {
    Scope() {}
  };

  PlainProducts(int group, int dim) : group_(group), dim_(DIM ? DIM : dim) {}

  void begin(const T* q) { q_ = q; }

  // scores[h][j] = <q[h], keys[j]>
  void score(Scores* scores, const Tile<T>& tile, const Tile<T>& next) const {
    const int dim = DIM ? DIM : dim_;
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int j = 0; j < run.count; j++) {
        const T* key = run.keys + int64_t{j} * dim;
        next.prefetch_keys(r, j, 1, dim);
        for (int h = 0; h < group_; h++) {
          float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
          for (int d = 0; d < dim; d++) dot += to_float(q_[h * dim + d]) * to_float(key[d]);
          scores[h][run.start + j] = dot;
        }
      }
    }
  }

  // out[h] += sum of weights[h][j] * values[j]
  void weigh(float* out, const Scores* weights, const Tile<T>& tile, const Tile<T>& next) const {
    const int dim = DIM ? DIM : dim_;
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int j = 0; j < run.count; j++) {
        const T* value = run.values + int64_t{j} * dim;
        next.prefetch_values(r, j, 1, dim);
        for (int h = 0; h < group_; h++) {
          const float weight = weights[h][run.start + j];
#pragma omp simd
          for (int d = 0; d < dim; d++) out[h * dim + d] += weight * to_float(value[d]);
        }
      }
    }
  }

  void store(T* to, const float* out, float scale) const {
    for (int d = 0; d < dim_; d++) to[d] = from_float<T>(out[d] * scale);
  }

 private:
  int group_;
  int dim_;
  const T* q_ = nullptr;  // [group, dim]
};
