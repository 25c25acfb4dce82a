// The operands of prefill attention's products as tiles of bf16 pairs (simd.h), for whatever multiplies them; head_dim a
// multiple of 32.
#pragma once

#include "prefill_plain.h"
#include "simd.h"

#if PDS_AVX512_BF16

class TiledOperands {
 public:
  static constexpr int COLS = 32;

  alignas(64) float scores[KEY_BLOCK * COLS];
  alignas(64) float out[MAX_HEAD_DIM * COLS];

  // `tokens` of the context, from token `first` on: K as it is; V as tiles of the transpose, [KEY_PAD keys][16 dims] each 16 rows of 32 keys.
  void gather(const PagedKv<bf16>& kv, int first, int tokens) {
    dim_ = kv.head_dim;
    const int padded = ceil_div(tokens, KEY_PAD) * KEY_PAD;
    keys_ = keys_memory_.get<bf16>(size_t(padded) * dim_);
    values_ = values_memory_.get<bf16>(size_t(padded) * dim_);
    for (int t = 0; t < padded; t += KEY_PAD) {
      const bf16* values[KEY_PAD];
      for (int i = 0; i < KEY_PAD; i++) {
        bf16* to = keys_ + int64_t{t + i} * dim_;
        values[i] = zeros_;
        if (t + i < tokens) {
          const bf16* key = kv.key(first + t + i);
          std::memcpy(to, key, dim_ * sizeof(bf16));
          values[i] = key + kv.value_offset;
        } else {
          std::memset(to, 0, dim_ * sizeof(bf16));
        }
      }
      for (int d = 0; d < dim_; d += 32) transpose_values(value_tiles(t, d), values, d);
    }
  }

  void take(const Columns<const bf16>& queries, int column) {
    for (int half = 0; half < 2; half++) {
      for (int d = 0; d < dim_; d += 32) {
        __m512i r[16];
        PDS_UNROLL
        for (int c = 0; c < 16; c++) {
          r[c] = load(queries.row(smaller(column + half * 16 + c, queries.count - 1)) + d);
        }
        store_tile(queries_ + (d / 16 + half) * TILE, r);
      }
    }
  }

  // The weights of keys `key` and `key + 1` for 16 columns are one row of a tile.
  PDS_INLINE void put(int key, int v, Floats even, Floats odd) {
    _mm512_store_si512(weights_ + (key / 32 * 2 + v) * TILE + key % 32 * 16,
                       pair_up(to_bf16((__m512)even, (__m512)odd)));
  }

  void finish(const Columns<bf16>& to, int column, int columns) {
    for (int half = 0; half < 2; half++) {
      for (int d = 0; d < dim_; d += 32) {
        __m512i r[16];
        transpose_to_bf16(r, out + d * COLS + half * 16, COLS, nullptr);
        const int count = smaller(columns - half * 16, 16);
        for (int c = 0; c < count; c++) _mm512_storeu_si512(to.row(column + half * 16 + c) + d, r[c]);
      }
    }
  }

 protected:
  // The two tiles of V^T of the keys t .. t + 31 and the dims d .. d + 31.
  PDS_INLINE bf16* value_tiles(int t, int d) const { return values_ + int64_t{t} * dim_ + d * KEY_PAD; }

  int dim_ = 0;
  bf16* keys_ = nullptr;    // [padded tokens, dim]
  bf16* values_ = nullptr;  // [padded tokens / 32][dim / 16] tiles
  alignas(64) bf16 queries_[MAX_HEAD_DIM * COLS];  // [dim / 32] pairs of right tiles, one for each half of the columns
  alignas(64) bf16 weights_[KEY_BLOCK * COLS];     // [keys / 32] such pairs

 private:
  static void transpose_values(bf16* to, const bf16* const values[KEY_PAD], int d) {
    __m512i upper[16], lower[16];  // pairs of keys by dims d .. d + 15, and by d + 16 .. d + 31
    PDS_UNROLL
    for (int i = 0; i < 16; i++) {
      const __m512i even = load(values[2 * i] + d), odd = load(values[2 * i + 1] + d);
      upper[i] = pair_up(_mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1));
      lower[i] = pair_up(_mm512_shuffle_i64x2(even, odd, 0xee));
    }
    store_tile(to, upper);
    store_tile(to + TILE, lower);
  }

  alignas(64) bf16 zeros_[MAX_HEAD_DIM] = {};
  Scratch keys_memory_, values_memory_;
};

#endif
