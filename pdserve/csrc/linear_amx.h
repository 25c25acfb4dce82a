// The matrix product in AMX tiles. Rows of w are rows of tiles as they lie, so the result is computed transposed, w
// x^T, and only x is packed.
#pragma once

#include "amx.h"
#include "linear.h"

#if PDS_AMX

constexpr int PACKED_BYTES = 1 << 20;  // of x at a time: stays in the L2 cache while all of w passes
constexpr int DEPTH = 576;             // of a panel at a time: 32 rows of w stay in the L1 cache while x passes

// A block of rows of x as tiles of pairs, [rows / 16][k / 32][16 pairs of k][16 rows], missing rows being zero.
struct PackedRows {
  const bf16* tiles;
  int first;
  int rows;

  PDS_INLINE const bf16* tile(int row, int at, int k) const { return tiles + int64_t{row} * k + at * 16; }
};

inline PackedRows pack_rows(const LinearArgs& args, int first, int rows, bf16* to) {
  const PackedRows packed{to, first, rows};
  const int padded = rows <= 16 ? 16 : ceil_div(rows, 32) * 32;
  for (int row = 0; row < padded; row += 16) {
    const bf16* from = args.x + int64_t{first + row} * args.k;
    for (int at = 0; at < args.k; at += 32, to += TILE) {
      __m512i r[16];
      PDS_UNROLL
      for (int i = 0; i < 16; i++) {
        r[i] = row + i < rows ? load(from + int64_t{i} * args.k + at) : _mm512_setzero_si512();
      }
      store_tile(to, r);
    }
  }
  return packed;
}

// The transpose of [32 of a panel, 16 rows of x] sums to the result.
PDS_INLINE void store_sums(const LinearArgs& args, const PackedRows& x, const float* sums, int ld, int panel, int row) {
  __m512i r[16];
  transpose_to_bf16(r, sums, ld, args.bias == nullptr ? nullptr : args.bias + panel);
  const int count = smaller(x.rows - row, 16);
  bf16* to = args.out + int64_t{x.first + row} * args.n + panel;
  PDS_UNROLL
  for (int i = 0; i < 16; i++) {
    if (i < count) _mm512_storeu_si512(to + int64_t{i} * args.n, r[i]);
  }
}

// Up to 16 rows: bound by the memory, so the panel that follows is fetched while this one is used.
inline void panel_of_few(const LinearArgs& args, const PackedRows& x, int panel) {
  alignas(64) float sums[PANEL * 16];
  const int64_t row_bytes = int64_t{args.k} * sizeof(bf16);
  const bf16 *upper = args.w + int64_t{panel} * args.k, *lower = upper + 16 * int64_t{args.k};
  const char* next = reinterpret_cast<const char*>(lower + 16 * int64_t{args.k});
  _tile_zero(0);
  _tile_zero(1);
  for (int at = 0; at < args.k; at += 32, next += PANEL * 64) {
    PDS_UNROLL
    for (int i = 0; i < PANEL; i++) __builtin_prefetch(next + i * 64, 0, 2);
    _tile_loadd(6, x.tile(0, at, args.k), 64);
    _tile_loadd(4, upper + at, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, lower + at, row_bytes);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  store_sums(args, x, sums, 16, panel, 0);
}

// Bound by arithmetic, and next by what passes from L2 to L1: so a panel is taken DEPTH at a time, which stays in L1
// because x passes it by (`stream` in multiply_2x2). `partial` holds the sums so far, [rows / 32][32 of the panel][32].
inline void panel_of_many(const LinearArgs& args, const PackedRows& x, int panel, float* partial) {
  const int64_t row_bytes = int64_t{args.k} * sizeof(bf16);
  const bf16 *upper = args.w + int64_t{panel} * args.k, *lower = upper + 16 * int64_t{args.k};
  const int depth = ceil_div(args.k, ceil_div(args.k, DEPTH) * 32) * 32;
  for (int begin = 0; begin < args.k; begin += depth) {
    const int end = smaller(begin + depth, args.k);
    for (int row = 0; row < x.rows; row += 32) {
      float* sums = depth < args.k ? partial + row * PANEL : partial;
      begin == 0 ? zero_2x2() : load_2x2(sums);
      for (int at = begin; at < end; at += 32) {
        multiply_2x2<true>(upper + at, lower + at, row_bytes, x.tile(row, at, args.k), x.tile(row + 16, at, args.k));
      }
      store_2x2(sums);
      if (end < args.k) continue;
      store_sums(args, x, sums, 32, panel, row);
      if (row + 16 < x.rows) store_sums(args, x, sums + 16, 32, panel, row + 16);
    }
  }
}

struct PartialSums : Scratch {};

inline void linear_amx(const LinearArgs& args, int threads) {
  const int most = larger(PACKED_BYTES / (args.k * static_cast<int>(sizeof(bf16))) / 32 * 32, 32);
  for (int first = 0; first < args.rows; first += most) {
    const int rows = smaller(args.rows - first, most);
    bf16* memory = of_this_thread<Scratch>().get<bf16>(size_t(ceil_div(rows, 32)) * 32 * args.k);
    const PackedRows x = pack_rows(args, first, rows, memory);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const AmxScope scope;
      float* partial = of_this_thread<PartialSums>().get<float>(size_t(ceil_div(rows, 32)) * 32 * PANEL);
#pragma omp for schedule(static)
      for (int panel = 0; panel < args.n; panel += PANEL) {
        rows <= 16 ? panel_of_few(args, x, panel) : panel_of_many(args, x, panel, partial);
      }
    }
  }
}

#endif
