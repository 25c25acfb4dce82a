// x [rows, K] times the transpose of w [N, K], bf16 with sums in float; N and K are multiples of 32.
//
// w is read as it lies in the file, row-major, and only once: a library that repacks it at every call loses half of the
// memory bandwidth, which is all there is to win with few rows. Rows of w are rows of AMX tiles already, so the result
// is computed transposed, w x^T, and only x, which is small, is packed. An element is summed in the same order whatever
// the number of rows, so the result for a row does not depend on the rest of the batch.
#pragma once

#include "amx.h"

#if PDS_AVX512_BF16

constexpr int PANEL = 32;  // rows of w that are taken together

struct LinearArgs {
  bf16* out;         // [rows, n]
  const bf16* x;     // [rows, k]
  const bf16* w;     // [n, k]
  const bf16* bias;  // [n], or null
  int rows;
  int n;
  int k;
};

#if PDS_AMX

// x as tiles of pairs: [rows / 16][k / 32][16 pairs of k][16 rows of x], missing rows being zero.
inline void pack_rows(bf16* to, const bf16* x, int rows, int padded_rows, int k) {
  for (int row = 0; row < padded_rows; row += 16) {
    for (int at = 0; at < k; at += 32, to += TILE) {
      __m512i r[16];
      PDS_UNROLL for (int i = 0; i < 16; i++) r[i] = row + i < rows ? load(x + int64_t{row + i} * k + at) : _mm512_setzero_si512();
      transpose_16x16(r);
      PDS_UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, r[i]);
    }
  }
}

// The transpose of 32 x 16 sums to rows row .. row + 15 of the result.
PDS_INLINE void store_panel(const LinearArgs& args, const float* sums, int ld, int panel, int row) {
  __m512i r[16];
  transpose_to_bf16(r, sums, ld, args.bias == nullptr ? nullptr : args.bias + panel);
  const int count = smaller(args.rows - row, 16);
  bf16* to = args.out + int64_t{row} * args.n + panel;
  for (int i = 0; i < count; i++) _mm512_storeu_si512(to + int64_t{i} * args.n, r[i]);
}

// Up to 16 rows: bound by the memory, so the panel that follows is fetched while this one is used.
inline void panel_of_few(const LinearArgs& args, const bf16* packed, int panel) {
  alignas(64) float sums[PANEL * 16];
  const int64_t row_bytes = int64_t{args.k} * sizeof(bf16);
  const bf16* w = args.w + int64_t{panel} * args.k;
  const char* next = reinterpret_cast<const char*>(w + int64_t{PANEL} * args.k);
  _tile_zero(0);
  _tile_zero(1);
  for (int at = 0; at < args.k; at += 32, next += PANEL * 64) {
    for (int i = 0; i < PANEL; i++) _mm_prefetch(next + i * 64, _MM_HINT_T1);
    _tile_loadd(6, packed + at * 16, 64);
    _tile_loadd(4, w + at, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + 16 * int64_t{args.k} + at, row_bytes);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  store_panel(args, sums, 16, panel, 0);
}

inline void panel_of_many(const LinearArgs& args, const bf16* packed, int panel) {
  alignas(64) float sums[PANEL * 32];
  const int64_t row_bytes = int64_t{args.k} * sizeof(bf16);
  const bf16* upper = args.w + int64_t{panel} * args.k;
  const bf16* lower = upper + 16 * int64_t{args.k};
  for (int row = 0; row < args.rows; row += 32) {
    const bf16* left = packed + int64_t{row} * args.k;
    const bf16* right = left + 16 * int64_t{args.k};
    zero_2x2();
    for (int at = 0; at < args.k; at += 32) {
      multiply_2x2(upper + at, lower + at, row_bytes, left + at * 16, right + at * 16);
    }
    store_2x2(sums);
    store_panel(args, sums, 32, panel, row);
    if (row + 16 < args.rows) store_panel(args, sums + 16, 32, panel, row + 16);
  }
}

inline void linear_amx(const LinearArgs& args, int threads) {
  static thread_local Scratch scratch;
  const bool few = args.rows <= 16;
  const int padded_rows = few ? 16 : ceil_div(args.rows, 32) * 32;
  bf16* packed = scratch.get<bf16>(size_t(padded_rows) * args.k);
  pack_rows(packed, args.x, args.rows, padded_rows, args.k);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const AmxScope scope;
#pragma omp for schedule(static)
    for (int panel = 0; panel < args.n; panel += PANEL) {
      few ? panel_of_few(args, packed, panel) : panel_of_many(args, packed, panel);
    }
  }
}

#endif

// 4 rows of w by 4 of x at a time, with dot products of pairs.
inline void panel_of_dots(const LinearArgs& args, int panel) {
  const int64_t k = args.k;
  for (int at = panel; at < panel + PANEL; at += 4) {
    const bf16* w = args.w + at * k;
    for (int row = 0; row < args.rows; row += 4) {
      const bf16* x[4];
      PDS_UNROLL for (int i = 0; i < 4; i++) x[i] = args.x + smaller(row + i, args.rows - 1) * k;
      __m512 sums[16] = {};
      for (int64_t d = 0; d < k; d += 32) {
        if (row == 0) {
          for (int j = 0; j < 4; j++) _mm_prefetch(w + (4 + j) * k + d, _MM_HINT_T0);
        }
        const __m512i rows[4] = {load(w + d), load(w + k + d), load(w + 2 * k + d), load(w + 3 * k + d)};
        PDS_UNROLL for (int i = 0; i < 4; i++) {
          const __m512i column = load(x[i] + d);
          PDS_UNROLL for (int j = 0; j < 4; j++) sums[4 * i + j] = dot(sums[4 * i + j], rows[j], column);
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
