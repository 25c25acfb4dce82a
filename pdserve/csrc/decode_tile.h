// What decode attention takes from the pool at a time.
#pragma once

#include "paged.h"

constexpr int KEYS = 64;   // tokens of a tile: amortises the reductions of the softmax; its K and V stay in L1
constexpr int SLACK = 16;  // keys are scored 16 at a time: what lies past the end of a run is overwritten or masked

using Scores = float[KEYS + SLACK];

// Up to KEYS tokens of a context, as runs of tokens that are contiguous in the pool.
template <class T>
struct Tile {
  struct Run {
    const T* keys;
    const T* values;
    int start;  // of the run within the tile
    int count;
  };
  Run runs[KEYS];
  int num_runs = 0;
  int tokens = 0;

  void fill(const PagedKv<T>& kv, int begin, int end) {
    tokens = smaller(KEYS, end - begin);
    num_runs = 0;
    for (int at = 0; at < tokens;) {
      const int count = smaller(kv.run(begin + at), tokens - at);
      const T* keys = kv.key(begin + at);
      runs[num_runs++] = {keys, keys + kv.value_offset, at, count};
      at += count;
    }
  }

  // Fetch rows `row` .. `row + count - 1` of the keys, or of the values, of a run. A few at a time, between the
  // arithmetic: the core has a few dozen misses in flight at most, and stalls on the next.
  PDS_INLINE void prefetch_keys(int run, int row, int count, int dim) const {
    if (run < num_runs && row < runs[run].count) prefetch(runs[run].keys + int64_t{row} * dim, count * dim);
  }
  PDS_INLINE void prefetch_values(int run, int row, int count, int dim) const {
    if (run < num_runs && row < runs[run].count) prefetch(runs[run].values + int64_t{row} * dim, count * dim);
  }

 private:
  static PDS_INLINE void prefetch(const T* from, int count) {
    const char* at = reinterpret_cast<const char*>(from);
    for (size_t i = 0; i < count * sizeof(T); i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};
