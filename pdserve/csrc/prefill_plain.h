// The products of prefill attention in float, in the compiler's vector type: any element type, any machine.
#pragma once

#include "paged.h"
#include "vector.h"

constexpr int KEY_BLOCK = 64;  // keys between two updates of the running maximum
constexpr int KEY_PAD = 32;    // K and V are gathered up to a multiple of it, the rest being zero

// The rows, of queries or of output, that belong to one (sequence, kv head): column c is head c % group of token
// c / group, so that neighbours share a position.
template <class T>
struct Columns {
  T* base;
  int64_t width;  // elements from one token to the next
  int group;
  int dim;
  int count;

  PDS_INLINE T* row(int column) const { return base + column / group * width + column % group * dim; }
};

template <class T>
class PlainChunk {
 public:
  static constexpr int COLS = 2 * LANES;
  struct Scope {
    Scope() {}
  };

  alignas(64) float scores[KEY_BLOCK * COLS];
  alignas(64) float out[MAX_HEAD_DIM * COLS];

  // `tokens` of the context, from token `first` on.
  void gather(const PagedKv<T>& kv, int first, int tokens) {
    dim_ = kv.head_dim;
    const int padded = ceil_div(tokens, KEY_PAD) * KEY_PAD;
    keys_ = keys_memory_.get<float>(size_t(padded) * dim_);
    values_ = values_memory_.get<float>(size_t(padded) * dim_);
    std::memset(keys_ + int64_t{tokens} * dim_, 0, sizeof(float) * (padded - tokens) * dim_);
    std::memset(values_ + int64_t{tokens} * dim_, 0, sizeof(float) * (padded - tokens) * dim_);
    for (int t = 0; t < tokens; t++) {
      widen(keys_ + int64_t{t} * dim_, kv.key(first + t));
      widen(values_ + int64_t{t} * dim_, kv.key(first + t) + kv.value_offset);
    }
  }

  void take(const Columns<const T>& queries, int column) {
    for (int c = 0; c < COLS; c++) {
      const T* row = queries.row(smaller(column + c, queries.count - 1));
      for (int d = 0; d < dim_; d++) queries_[d * COLS + c] = to_float(row[d]);
    }
  }

  void score(int key, int count) {
    for (int k = 0; k < count; k += ROWS) {
      multiply<false>(scores + k * COLS, keys_ + int64_t{key + k} * dim_, dim_, 1, queries_, dim_);
    }
  }

  // The weights of keys `key` and `key + 1` take the place of their scores.
  PDS_INLINE void put(int key, int v, Floats even, Floats odd) {
    store_floats(scores + key * COLS + v * LANES, even);
    store_floats(scores + (key + 1) * COLS + v * LANES, odd);
  }

  void weigh(int key, int count) {
    for (int d = 0; d < dim_; d += ROWS) {
      multiply<true>(out + d * COLS, values_ + int64_t{key} * dim_ + d, 1, dim_, scores, count);
    }
  }

  void finish(const Columns<T>& to, int column, int columns) {
    for (int c = 0; c < columns; c++) {
      T* row = to.row(column + c);
      for (int d = 0; d < dim_; d++) row[d] = from_float<T>(out[d * COLS + c]);
    }
  }

 private:
  static constexpr int ROWS = LANES == 16 ? 8 : 4;  // ROWS x 2 sums fill half of the register file

  void widen(float* to, const T* from) {
    for_lanes(dim_, [=](int d, auto v) { store_as<decltype(v)>(to + d, load_as<decltype(v)>(from + d)); });
  }

  // c [ROWS, COLS] = or += a [ROWS, depth] * b [depth, COLS]
  template <bool ADD>
  static void multiply(float* c, const float* a, int64_t row_stride, int64_t depth_stride, const float* b, int depth) {
    Floats sum[ROWS][2];
    PDS_UNROLL
    for (int r = 0; r < ROWS; r++) {
      PDS_UNROLL
      for (int v = 0; v < 2; v++) sum[r][v] = ADD ? load_floats(c + r * COLS + v * LANES) : Floats{};
    }
    for (int k = 0; k < depth; k++, a += depth_stride, b += COLS) {
      const Floats left = load_floats(b), right = load_floats(b + LANES);
      PDS_UNROLL
      for (int r = 0; r < ROWS; r++) {
        sum[r][0] += a[r * row_stride] * left;
        sum[r][1] += a[r * row_stride] * right;
      }
    }
    PDS_UNROLL
    for (int r = 0; r < ROWS; r++) {
      PDS_UNROLL
      for (int v = 0; v < 2; v++) store_floats(c + r * COLS + v * LANES, sum[r][v]);
    }
  }

  int dim_ = 0;
  float* keys_ = nullptr;    // [padded tokens, dim]
  float* values_ = nullptr;  // [padded tokens, dim]
  alignas(64) float queries_[MAX_HEAD_DIM * COLS];
  Scratch keys_memory_, values_memory_;
};
