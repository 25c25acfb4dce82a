// The products of prefill attention with AVX-512 BF16: 32 multiply-adds of bf16 pairs into float an instruction.
#pragma once

#include "prefill_tiled.h"

#if PDS_AVX512_BF16

class Bf16Chunk : public TiledOperands {
 public:
  struct Scope {
    Scope() {}
  };

  void score(int key, int count) {
    for (int k = 0; k < count; k += ROWS) {
      multiply<false>(scores + k * COLS, keys_ + int64_t{key + k} * dim_, dim_, 32, queries_, dim_ / 32);
    }
  }

  void weigh(int key, int count) {
    for (int d = 0; d < dim_; d += ROWS) {
      const bf16* rows = value_tiles(key, d / 32 * 32) + d % 32 * 32;
      multiply<true>(out + d * COLS, rows, 32, int64_t{KEY_PAD} * dim_, weights_, count / 32);
    }
  }

 private:
  static constexpr int ROWS = 8;  // ROWS x 2 sums fill half of the register file

  // c [ROWS, COLS] = or += the product of ROWS rows and COLS columns, 32 deep a step: from one step to the next the rows
  // are `step` further on, the columns two tiles.
  template <bool ADD>
  static void multiply(float* c, const bf16* rows, int64_t row_stride, int64_t step, const bf16* columns, int steps) {
    __m512 sum[ROWS][2];
    PDS_UNROLL
    for (int r = 0; r < ROWS; r++) {
      PDS_UNROLL
      for (int v = 0; v < 2; v++) sum[r][v] = ADD ? _mm512_load_ps(c + r * COLS + v * 16) : _mm512_setzero_ps();
    }
    for (int s = 0; s < steps; s++, rows += step, columns += 2 * TILE) {
      for (int pair = 0; pair < 16; pair++) {
        const __m512i left = load(columns + pair * 32), right = load(columns + TILE + pair * 32);
        PDS_UNROLL
        for (int r = 0; r < ROWS; r++) {
          int32_t both;
          std::memcpy(&both, rows + r * row_stride + 2 * pair, sizeof both);
          const __m512i broadcast = _mm512_set1_epi32(both);
          sum[r][0] = dot(sum[r][0], broadcast, left);
          sum[r][1] = dot(sum[r][1], broadcast, right);
        }
      }
    }
    PDS_UNROLL
    for (int r = 0; r < ROWS; r++) {
      PDS_UNROLL
      for (int v = 0; v < 2; v++) _mm512_store_ps(c + r * COLS + v * 16, sum[r][v]);
    }
  }
};

#endif
