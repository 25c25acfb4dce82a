// x [rows, K] times the transpose of w [N, K] in 8 or 4 bits, plus a bias; N is a multiple of 16, K of 32.
//
// x is rounded to 8 bits too, each 32 elements with a scale of their own, so that a group's products are summed exactly
// in integers; the groups are summed in float, in the same order whatever the number of rows: the result for a row
// does not depend on the rest of the batch. pdserve/kernels/quantised.py says how w lies in memory.
#pragma once

#include <cmath>

#include "common.h"

constexpr int GROUP = 32;     // columns that share a scale
constexpr int BAND = 16;      // rows of w that lie interleaved
constexpr int CHUNKS = 8;     // of 4 columns, in a group
constexpr int MOST_ROWS = 8;  // of x at a time, in registers

template <class T>
struct QuantisedArgs {
  T* out;  // [rows, n]
  const T* x;  // [rows, k]
  const uint8_t* w;  // [n / BAND, k / GROUP, bits * 64]
  const _Float16* scales;  // [n / BAND, k / GROUP, 1 or 2, BAND]: the scale and, with 4 bits, the value of level 0
  const T* bias;  // [n], or null
  int rows;
  int n;
  int k;
};

// x as scales * values.
struct RoundedRows {
  int8_t* values;  // [rows, k]
  float* scales;  // [rows, k / GROUP]
  int32_t* sums;  // [rows, k / GROUP], of values
};

template <class T>
void round_group(const T* x, int8_t* values, float* scale, int32_t* sum) {
  float wide[GROUP], most = 0.0f;
  for (int i = 0; i < GROUP; i++) wide[i] = to_float(x[i]);
  for (int i = 0; i < GROUP; i++) most = std::fabs(wide[i]) > most ? std::fabs(wide[i]) : most;
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  int32_t total = 0;
  for (int i = 0; i < GROUP; i++) {
    const int32_t level = static_cast<int32_t>(std::nearbyint(wide[i] * inverse));
    values[i] = static_cast<int8_t>(level);
    total += level;
  }
  *scale = most / 127.0f;
  *sum = total;
}

template <class T>
RoundedRows round_rows(const QuantisedArgs<T>& args) {
  const size_t groups = size_t(args.rows) * (args.k / GROUP);
  char* memory = of_this_thread<Scratch>().get<char>(groups * (GROUP + sizeof(float) + sizeof(int32_t)));
  float* scales = reinterpret_cast<float*>(memory + groups * GROUP);
  const RoundedRows rounded{reinterpret_cast<int8_t*>(memory), scales, reinterpret_cast<int32_t*>(scales + groups)};
  for (size_t g = 0; g < groups; g++) {
    round_group(args.x + g * GROUP, rounded.values + g * GROUP, rounded.scales + g, rounded.sums + g);
  }
  return rounded;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)

PDS_INLINE __m512i four_columns(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

// sums[i][lane] = row i of x times row `lane` of the panel.
template <int BITS, int ROWS>
void multiply_panel(const uint8_t* w, const _Float16* scales, const RoundedRows& x, int row, int groups,
                    float (*sums)[BAND]) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const int8_t* values = x.values + int64_t{row} * groups * GROUP;
  const float* x_scales = x.scales + int64_t{row} * groups;
  const int32_t* x_sums = x.sums + int64_t{row} * groups;
  __m512 total[ROWS] = {};
  for (int g = 0; g < groups; g++, w += BITS * 64, values += GROUP) {
    __m512i dots[ROWS];
    PDS_UNROLL
    for (int i = 0; i < ROWS; i++) {
      // Levels of 8 bits are stored as level + 128, since the instruction takes one operand unsigned.
      dots[i] = BITS == 8 ? _mm512_set1_epi32(-128 * x_sums[i * groups + g]) : _mm512_setzero_si512();
    }
    PDS_UNROLL
    for (int c = 0; c < CHUNKS; c += 8 / BITS) {
      const __m512i bytes = _mm512_loadu_si512(w + c * BITS * 8);
      const __m512i levels[2] = {BITS == 8 ? bytes : _mm512_and_si512(bytes, nibble),
                                 _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
      PDS_UNROLL
      for (int half = 0; half < 8 / BITS; half++) {
        PDS_UNROLL
        for (int i = 0; i < ROWS; i++) {
          const __m512i columns = four_columns(values + int64_t{i} * groups * GROUP + (c + half) * 4);
          dots[i] = _mm512_dpbusd_epi32(dots[i], levels[half], columns);
        }
      }
    }
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    scales += BAND;
    PDS_UNROLL
    for (int i = 0; i < ROWS; i++) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[i * groups + g]));
      total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i]), both, total[i]);
    }
    if constexpr (BITS == 4) {
      const __m512 least = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
      scales += BAND;
      PDS_UNROLL
      for (int i = 0; i < ROWS; i++) {
        const float x_total = x_scales[i * groups + g] * static_cast<float>(x_sums[i * groups + g]);
        total[i] = _mm512_fmadd_ps(least, _mm512_set1_ps(x_total), total[i]);
      }
    }
  }
  PDS_UNROLL
  for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(sums[i], total[i]);
}

#else

template <int BITS, int ROWS>
void multiply_panel(const uint8_t* w, const _Float16* scales, const RoundedRows& x, int row, int groups,
                    float (*sums)[BAND]) {
  const int panels = BITS == 8 ? 1 : 2;  // of scales, in a group
  for (int i = 0; i < ROWS; i++) {
    const int64_t first = int64_t{row + i} * groups;
    for (int lane = 0; lane < BAND; lane++) sums[i][lane] = 0.0f;
    for (int g = 0; g < groups; g++) {
      const uint8_t* bytes = w + int64_t{g} * BITS * 64;
      const int8_t* values = x.values + (first + g) * GROUP;
      int32_t dots[BAND] = {};
      for (int c = 0; c < CHUNKS; c++) {
        for (int lane = 0; lane < BAND; lane++) {
          for (int b = 0; b < 4; b++) {
            const uint8_t byte = bytes[(BITS == 8 ? c : c / 2) * 64 + lane * 4 + b];
            const int level = BITS == 8 ? byte - 128 : c % 2 == 0 ? byte & 15 : byte >> 4;
            dots[lane] += level * values[c * 4 + b];
          }
        }
      }
      const _Float16* at = scales + int64_t{g} * panels * BAND;
      for (int lane = 0; lane < BAND; lane++) {
        sums[i][lane] += static_cast<float>(dots[lane]) * (static_cast<float>(at[lane]) * x.scales[first + g]);
        if (BITS == 4) sums[i][lane] += static_cast<float>(at[BAND + lane]) * (x.scales[first + g] * x.sums[first + g]);
      }
    }
  }
}

#endif

template <class T, int BITS, int ROWS>
void panel_of_rows(const QuantisedArgs<T>& args, const RoundedRows& x, int panel, int row) {
  const int groups = args.k / GROUP;
  const int64_t at = int64_t{panel} * groups;
  float sums[ROWS][BAND];
  multiply_panel<BITS, ROWS>(args.w + at * BITS * 64, args.scales + at * BAND * (8 / BITS), x, row, groups, sums);
  for (int i = 0; i < ROWS; i++) {
    T* out = args.out + int64_t{row + i} * args.n + panel * BAND;
    for (int lane = 0; lane < BAND; lane++) {
      const float add = args.bias == nullptr ? 0.0f : to_float(args.bias[panel * BAND + lane]);
      out[lane] = from_float<T>(sums[i][lane] + add);
    }
  }
}

// As many rows as fit of 8, 4, 2 and 1 at a time.
template <class T, int BITS, int ROWS = MOST_ROWS>
void panel_times_all(const QuantisedArgs<T>& args, const RoundedRows& x, int panel, int row) {
  for (; row + ROWS <= args.rows; row += ROWS) panel_of_rows<T, BITS, ROWS>(args, x, panel, row);
  if constexpr (ROWS > 1) panel_times_all<T, BITS, ROWS / 2>(args, x, panel, row);
}

template <class T, int BITS>
void linear_quantised(const QuantisedArgs<T>& args, int threads) {
  const RoundedRows x = round_rows(args);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int panel = 0; panel < args.n / BAND; panel++) panel_times_all<T, BITS>(args, x, panel, 0);
}
