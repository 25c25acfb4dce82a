// What the AVX-512 and AMX kernels share: dot products of bf16 pairs, transposes, the layout of a tile.
#pragma once

#include "common.h"

#if PDS_AVX512_BF16

PDS_INLINE __m512i load(const bf16* from) { return _mm512_loadu_si512(from); }

// sum + a * b over the pairs of bf16 in each 32-bit lane.
PDS_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// 32 floats, `low` first, as bf16.
PDS_INLINE __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Lane i of the result is the sum of the lanes of v[i].
PDS_INLINE __m512 sum_lanes(const __m512 v[16]) {
  __m512 quads[4];  // lane 4 b + i of quads[g] is the sum of 128-bit block b of v[4 g + i]
  PDS_UNROLL
  for (int g = 0; g < 4; g++) {
    const __m512 *a = v + 4 * g, *b = a + 1, *c = a + 2, *d = a + 3;
    const __m512 ab = _mm512_unpacklo_ps(*a, *b) + _mm512_unpackhi_ps(*a, *b);
    const __m512 cd = _mm512_unpacklo_ps(*c, *d) + _mm512_unpackhi_ps(*c, *d);
    quads[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))) +
               _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  }
  const __m512 low = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) + _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
  const __m512 high = _mm512_shuffle_f32x4(quads[2], quads[3], 0x88) + _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

// 32 sums of which each eight holds the low halves of four unpacked pairs, then the high halves: in order, as bf16.
PDS_INLINE void store_unpacked(bf16* to, const float* from, float scale) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 low = _mm512_loadu_ps(from) * scale, high = _mm512_loadu_ps(from + 16) * scale;
  _mm512_storeu_si512(to, to_bf16(_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high)));
}

// r[i] lane j <-> r[j] lane i, of 32 bits.
PDS_INLINE void transpose_16x16(__m512i r[16]) {
  __m512i t[16];
  PDS_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  PDS_UNROLL
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  PDS_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  PDS_UNROLL
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// bf16 of a tile, the unit in which operands are laid out for AMX and for dot products of pairs alike: a left one is 16
// rows of 32; a right one is 16 pairs of rows, interleaved, of 16 columns.
constexpr int TILE = 512;

// The transpose of 16 rows of 16 pairs: a tile of columns.
PDS_INLINE void store_tile(bf16* to, __m512i r[16]) {
  transpose_16x16(r);
  PDS_UNROLL
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, r[i]);
}

// Interleave the halves of a vector of 32 bf16: (0, 16, 1, 17, ...), so that two rows become one row of pairs.
PDS_INLINE __m512i pair_up(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// The transpose of 32 rows of floats, 16 columns of each, as bf16: r[c] is column c. `add` (one for each of the 32
// rows) may be null.
PDS_INLINE void transpose_to_bf16(__m512i r[16], const float* from, int ld, const bf16* add) {
  PDS_UNROLL
  for (int i = 0; i < 16; i++) {
    __m512 a = _mm512_loadu_ps(from + 2 * i * ld), b = _mm512_loadu_ps(from + (2 * i + 1) * ld);
    if (add != nullptr) a += to_float(add[2 * i]), b += to_float(add[2 * i + 1]);
    r[i] = pair_up(to_bf16(a, b));
  }
  transpose_16x16(r);
}

#endif
