// The products of prefill attention in AMX tiles.
#pragma once

#include "amx.h"
#include "prefill_tiled.h"

#if PDS_AMX

class AmxChunk : public TiledOperands {
 public:
  using Scope = AmxScope;

  void score(int key, int count) {
    for (int k = 0; k < count; k += 32) {
      const bf16* rows = keys_ + int64_t{key + k} * dim_;
      zero_2x2();
      for (int d = 0; d < dim_; d += 32) {
        const bf16* columns = queries_ + d / 16 * TILE;
        multiply_2x2<false>(rows + d, rows + 16 * dim_ + d, dim_ * sizeof(bf16), columns, columns + TILE);
      }
      store_2x2(scores + k * COLS);
    }
  }

  void weigh(int key, int count) {
    for (int d = 0; d < dim_; d += 32) {
      load_2x2(out + d * COLS);
      for (int k = 0; k < count; k += 32) {
        const bf16 *rows = value_tiles(key + k, d), *columns = weights_ + k / 16 * TILE;
        multiply_2x2<false>(rows, rows + TILE, 64, columns, columns + TILE);
      }
      store_2x2(out + d * COLS);
    }
  }
};

#endif
