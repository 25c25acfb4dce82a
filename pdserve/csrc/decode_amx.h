// The products of decode attention in AMX tiles, for blocks of a multiple of 16 tokens. Up to 16 query heads at a time.
#pragma once

#include "amx.h"
#include "decode_tile.h"

#if PDS_AMX

template <int DIM_>
class AmxProducts {
 public:
  static constexpr int DIM = DIM_;
  static_assert(DIM % 64 == 0);
  static constexpr int HEADS = 16;  // the output has a multiple of it, of which the last are unused
  using Scope = AmxScope;

  AmxProducts(int group, int /*dim*/) : group_(group) {}

  // q as tiles of pairs: [heads / 16][dim / 32][16 pairs of dims][16 heads].
  void begin(const bf16* q) {
    for (int h = 0; h < group_; h += HEADS) {
      for (int d = 0; d < DIM; d += 32) {
        __m512i r[16];
        PDS_UNROLL for (int i = 0; i < 16; i++) r[i] = load(q + smaller(h + i, group_ - 1) * DIM + d);
        transpose_16x16(r);
        PDS_UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(q_ + h * DIM + d * 16 + i * 32, r[i]);
      }
    }
  }

  // Keys are rows of a tile as they lie: the scores come out as [16 keys, 16 heads].
  void score(Scores* scores, const Tile<bf16>& tile, const Tile<bf16>& next) const {
    alignas(64) float sums[16 * 16];
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int at = 0; at < run.count; at += 16) {
        const bf16* keys = run.keys + at * DIM;
        for (int h = 0; h < group_; h += HEADS) {
          _tile_zero(0);
          PDS_UNROLL for (int d = 0; d < DIM; d += 32) {
            if (h == 0) next.prefetch(r, at + d * 16 / DIM, 16 * 32 / DIM, 0, DIM);
            _tile_loadd(4, keys + d, DIM * sizeof(bf16));
            _tile_loadd(6, q_ + h * DIM + d * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
          }
          _tile_stored(0, sums, 64);
          __m512i t[16];
          PDS_UNROLL for (int i = 0; i < 16; i++) t[i] = _mm512_load_si512(sums + i * 16);
          transpose_16x16(t);
          for (int i = 0; i < smaller(group_ - h, HEADS); i++) {
            _mm512_storeu_si512(scores[h + i] + run.start + at, t[i]);
          }
        }
      }
    }
  }

  void weigh(float* out, const Scores* scores, const Tile<bf16>& tile, const Tile<bf16>& next) {
    for (int from = 0; from < tile.tokens; from += 32) {
      pair_values(tile, next, from);
      for (int h = 0; h < group_; h += HEADS) {
        for (int i = 0; i < smaller(group_ - h, HEADS); i++) {
          const float* weights = scores[h + i] + from;
          _mm512_store_si512(weights_ + i * 32, to_bf16(_mm512_load_ps(weights), _mm512_load_ps(weights + 16)));
        }
        _tile_loadd(4, weights_, 64);
        for (int d = 0; d < DIM; d += 32) {
          float* to = out + h * DIM + d;
          _tile_loadd(0, to, DIM * sizeof(float));
          _tile_loadd(1, to + 16, DIM * sizeof(float));
          _tile_loadd(6, values_ + d * 32, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, values_ + d * 32 + TILE, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_stored(0, to, DIM * sizeof(float));
          _tile_stored(1, to + 16, DIM * sizeof(float));
        }
      }
    }
  }

  static void store(bf16* to, const float* out, float scale, int /*dim*/) {
    for (int d = 0; d < DIM; d += 32) store_unpacked(to + d, out + d, scale);
  }

 private:
  // The values of tokens from .. from + 31 as tiles of pairs, [dim / 16][16 pairs of tokens][16 dims], zero past the end.
  void pair_values(const Tile<bf16>& tile, const Tile<bf16>& next, int from) {
    for (int i = 0; i < 16; i++) {
      const int token = from + 2 * i;
      const int r = token / tile.block;
      const auto& run = tile.runs[r];
    }
  }

  int group_;
  alignas(64) bf16 q_[MAX_GROUP * DIM];
  alignas(64) bf16 weights_[HEADS * 32] = {};
  alignas(64) bf16 values_[32 * DIM];
};

#endif
