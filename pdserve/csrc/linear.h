// x [rows, K] times the transpose of w [N, K], plus a bias: bf16 with sums in float; N and K are multiples of 32.
//
// w is read as it lies in the file, row-major, and once: a library that rearranges it at every call loses half of the
// memory bandwidth, which is all there is to win with few rows. An element is summed in the same order whatever the
// number of rows, so the result for a row does not depend on the rest of the batch.
#pragma once

#include "simd.h"

struct LinearArgs {
  bf16* out;         // [rows, n]
  const bf16* x;     // [rows, k]
  const bf16* w;     // [n, k]
  const bf16* bias;  // [n], or null
  int rows;
  int n;
  int k;
};

constexpr int PANEL = 32;  // rows of w that are taken together

#if PDS_AVX512_BF16

// With dot products of pairs: 4 rows of w by 4 of x at a time. For a handful of rows, bound by reading w.
inline void panel_of_dots(const LinearArgs& args, int panel) {
  const int64_t k = args.k;
  for (int at = panel; at < panel + PANEL; at += 4) {
    const bf16* w = args.w + at * k;
    for (int row = 0; row < args.rows; row += 4) {
      const bf16* x[4];
      PDS_UNROLL
      for (int i = 0; i < 4; i++) x[i] = args.x + smaller(row + i, args.rows - 1) * k;
      __m512 sums[16] = {};
      for (int64_t d = 0; d < k; d += 32) {
        if (row == 0) {
          PDS_UNROLL
          for (int j = 4; j < 8; j++) __builtin_prefetch(w + j * k + d);
        }
        const __m512i rows[4] = {load(w + d), load(w + k + d), load(w + 2 * k + d), load(w + 3 * k + d)};
        PDS_UNROLL
        for (int i = 0; i < 4; i++) {
          const __m512i column = load(x[i] + d);
          PDS_UNROLL
          for (int j = 0; j < 4; j++) sums[4 * i + j] = dot(sums[4 * i + j], rows[j], column);
        }
      }
      alignas(64) float block[16];
      _mm512_store_ps(block, sum_lanes(sums));
      const int count = smaller(args.rows - row, 4);
      for (int i = 0; i < count * 4; i++) {
        const int column = at + i % 4;
        const float add = args.bias == nullptr ? 0.0f : to_float(args.bias[column]);
        args.out[int64_t{row + i / 4} * args.n + column] = from_float<bf16>(block[i] + add);
      }
    }
  }
}

inline void linear_dots(const LinearArgs& args, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int panel = 0; panel < args.n; panel += PANEL) panel_of_dots(args, panel);
}

#endif
