// The products of decode attention with AVX-512 BF16: 32 multiply-adds of bf16 pairs into float an instruction.
#pragma once

#include "decode_tile.h"
#include "simd.h"

#if PDS_AVX512_BF16

template <int DIM>
class Bf16Products {
 public:
  static_assert(DIM % 64 == 0);
  static constexpr int HEADS = 1;
  struct Scope {
    Scope() {}
  };

  Bf16Products(int group, int /*dim*/) : group_(group) {}

  void begin(const bf16* q) { q_ = q; }

  void score(Scores* scores, const Tile<bf16>& tile, const Tile<bf16>& next) const {
    const int share = ceil_div(16, group_);
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int at = 0; at < run.count; at += 16) {
        const bf16* keys = run.keys + at * DIM;
        const int last = smaller(run.count - at, 16) - 1;
        for (int h = 0; h < group_; h++) {
          if (h * share < 16) next.prefetch_keys(r, at + h * share, share, DIM);
          _mm512_storeu_ps(scores[h] + run.start + at, score_16(q_ + h * DIM, keys, last));
        }
      }
    }
  }

  void weigh(float* out, const Scores* weights, const Tile<bf16>& tile, const Tile<bf16>& next) const {
    for (int h = 0; h < group_; h += 4) {
      float* to = out + h * DIM;
      switch (group_ - h) {
        case 1: weigh_heads<1>(to, weights + h, tile, next, h == 0); break;
        case 2: weigh_heads<2>(to, weights + h, tile, next, h == 0); break;
        case 3: weigh_heads<3>(to, weights + h, tile, next, h == 0); break;
        default: weigh_heads<4>(to, weights + h, tile, next, h == 0);
      }
    }
  }

  void store(bf16* to, const float* out, float scale) const {
    for (int d = 0; d < DIM; d += 32) store_unpacked(to + d, out + d, scale);
  }

 private:
  // Keys 0..last (at most 16) against one query; lanes past `last` repeat it.
  static PDS_INLINE __m512 score_16(const bf16* q, const bf16* keys, int last) {
    __m512 dots[16];
    PDS_UNROLL
    for (int j = 0; j < 16; j++) {
      const bf16* key = keys + smaller(j, last) * DIM;
      dots[j] = _mm512_setzero_ps();
      PDS_UNROLL
      for (int d = 0; d < DIM; d += 32) dots[j] = dot(dots[j], load(q + d), load(key + d));
    }
    return sum_lanes(dots);
  }

  // Two values at a time: their words interleaved make the pairs of a dot product with a pair of weights.
  template <int HEADS>
  static void weigh_heads(float* out, const Scores* weights, const Tile<bf16>& tile, const Tile<bf16>& next,
                          bool prefetch) {
    alignas(64) bf16 narrow[HEADS][KEYS + SLACK];
    for (int h = 0; h < HEADS; h++) {
      for (int j = 0; j < KEYS; j += 32) {
        _mm512_storeu_si512(narrow[h] + j,
                            to_bf16(_mm512_loadu_ps(weights[h] + j), _mm512_loadu_ps(weights[h] + j + 16)));
      }
    }
    for (int d = 0; d < DIM; d += 64) {
      __m512 sums[HEADS][4];
      PDS_UNROLL
      for (int h = 0; h < HEADS; h++) {
        PDS_UNROLL
        for (int i = 0; i < 4; i++) sums[h][i] = _mm512_loadu_ps(out + h * DIM + d + i * 16);
      }
      for (int r = 0; r < tile.num_runs; r++) {
        const auto& run = tile.runs[r];
        const bf16* values = run.values + d;
        for (int j = 0; j < run.count; j += 2, values += 2 * DIM) {
          if (prefetch && d == 0) next.prefetch_values(r, j, 2, DIM);
          const bool odd = j + 1 == run.count;  // the last of an odd run pairs with itself, at weight 0
          const bf16* second = odd ? values : values + DIM;
          const __m512i a = load(values), b = load(second), c = load(values + 32), e = load(second + 32);
          const __m512i pairs[4] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b),
                                    _mm512_unpacklo_epi16(c, e), _mm512_unpackhi_epi16(c, e)};
          PDS_UNROLL
          for (int h = 0; h < HEADS; h++) {
            uint32_t weight;
            std::memcpy(&weight, narrow[h] + run.start + j, sizeof weight);
            const __m512i both = _mm512_set1_epi32(static_cast<int>(odd ? weight & 0xffffu : weight));
            PDS_UNROLL
            for (int i = 0; i < 4; i++) sums[h][i] = dot(sums[h][i], both, pairs[i]);
          }
        }
      }
      PDS_UNROLL
      for (int h = 0; h < HEADS; h++) {
        PDS_UNROLL
        for (int i = 0; i < 4; i++) _mm512_storeu_ps(out + h * DIM + d + i * 16, sums[h][i]);
      }
    }
  }

  int group_;
  const bf16* q_ = nullptr;  // [group, dim]
};

#endif
