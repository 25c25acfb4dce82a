// The products of decode attention in AMX tiles, 16 query heads at a time; for blocks of a multiple of 16 tokens.
#pragma once

#include "amx.h"
#include "decode_tile.h"

#if PDS_AMX

template <int DIM>
class AmxProducts {
 public:
  static_assert(DIM % 32 == 0);
  static constexpr int HEADS = 16;
  using Scope = AmxScope;

  AmxProducts(int group, int /*dim*/) : group_(group) {}

  // q as tiles of pairs: [heads / 16][dim / 32][16 pairs of dims][16 heads].
  void begin(const bf16* q) {
    for (int h = 0; h < group_; h += HEADS) {
      for (int d = 0; d < DIM; d += 32) {
        __m512i r[16];
        PDS_UNROLL
        for (int i = 0; i < 16; i++) r[i] = load(q + smaller(h + i, group_ - 1) * DIM + d);
        store_tile(q_ + h * DIM + d * 16, r);
      }
    }
  }

  // Keys are rows of a tile as they lie in the pool, so the scores come out as [16 keys, 16 heads].
  void score(Scores* scores, const Tile<bf16>& tile, const Tile<bf16>& next) const {
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int at = 0; at < run.count; at += 16) {
        for (int h = 0; h < group_; h += HEADS) score_16(scores + h, run, at, h);
        next.prefetch_keys(r, at, 16, DIM);
      }
    }
  }

  void weigh(float* out, const Scores* scores, const Tile<bf16>& tile, const Tile<bf16>& next) {
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int at = 0; at < run.count; at += 16) {
        const int count = smaller(run.count - at, 16);
        pair_16(run.start + at, run.values + at * DIM, count, [&](int i) { next.prefetch_values(r, at + i, 2, DIM); });
      }
    }
    // The products take 32 tokens at a time.
    const int halves = ceil_div(tile.tokens, 16);
    if (halves % 2 != 0) pair_16(halves * 16, nullptr, 0, [](int) {});
    for (int h = 0; h < group_; h += HEADS) weigh_heads(out + h * DIM, scores + h, h, ceil_div(tile.tokens, 32));
  }

  void store(bf16* to, const float* out, float scale) const {
    for (int d = 0; d < DIM; d += 32) store_unpacked(to + d, out + d, scale);
  }

 private:
  PDS_INLINE void score_16(Scores* scores, const Tile<bf16>::Run& run, int at, int h) const {
    alignas(64) float sums[16 * 16];
    _tile_zero(0);
    PDS_UNROLL
    for (int d = 0; d < DIM; d += 32) {
      _tile_loadd(4, run.keys + at * DIM + d, DIM * sizeof(bf16));
      _tile_loadd(6, q_ + h * DIM + d * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
    __m512i t[16];
    PDS_UNROLL
    for (int i = 0; i < 16; i++) t[i] = _mm512_load_si512(sums + i * 16);
    transpose_16x16(t);
    const int heads = smaller(group_ - h, HEADS);
    PDS_UNROLL
    for (int i = 0; i < 16; i++) {
      if (i < heads) _mm512_storeu_si512(scores[i] + run.start + at, t[i]);
    }
  }

  // 16 tokens of the tile, from `token` on, as half of the rows of tiles [32 tokens][dim / 16][16 pairs][16 dims];
  // those past `count` are zero, for what lies there is not a number.
  template <class Between>
  PDS_INLINE void pair_16(int token, const bf16* values, int count, Between between) {
    bf16* to = values_ + token / 32 * 32 * DIM + token % 32 * 16;
    for (int i = 0; i < 16; i += 2) {
      between(i);
      for (int d = 0; d < DIM; d += 32) {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i even = i < count ? load(values + i * DIM + d) : zero;
        const __m512i odd = i + 1 < count ? load(values + (i + 1) * DIM + d) : zero;
        _mm512_store_si512(to + d / 16 * TILE + i * 16, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + (d / 16 + 1) * TILE + i * 16, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  PDS_INLINE void weigh_heads(float* out, const Scores* weights, int h, int steps) {
    alignas(64) bf16 narrow[KEYS / 32 * TILE];
    const int heads = smaller(group_ - h, HEADS);
    for (int k = 0; k < steps; k++) {
      for (int i = 0; i < heads; i++) {
        const float* from = weights[i] + k * 32;
        _mm512_store_si512(narrow + k * TILE + i * 32, to_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)));
      }
    }
    for (int d = 0; d < DIM; d += 32) {
      _tile_loadd(0, out + d, DIM * sizeof(float));
      _tile_loadd(1, out + d + 16, DIM * sizeof(float));
      for (int k = 0; k < steps; k++) {
        const bf16* values = values_ + k * 32 * DIM + d * 32;
        _tile_loadd(4, narrow + k * TILE, 64);
        _tile_loadd(6, values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, out + d, DIM * sizeof(float));
      _tile_stored(1, out + d + 16, DIM * sizeof(float));
    }
  }

  int group_;
  alignas(64) bf16 q_[MAX_GROUP * DIM];
  alignas(64) bf16 values_[KEYS * DIM];
};

#endif
