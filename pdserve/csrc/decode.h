// Decode attention: one query row per sequence, bound by reading KV from memory.
//
// All query heads of a kv head are taken together, so each line of K and V is read once. A context is walked in tiles
// of KEYS tokens with an online softmax (Milakov and Gimelshein, arXiv 1805.02867) while the tile after it is
// prefetched: neighbouring blocks lie far apart, where the hardware prefetcher does not follow. With more threads than
// (sequence, kv head) pairs a context is split and the parts are merged (flash decoding).
#pragma once

#include <vector>

#include "common.h"

constexpr int KEYS = 64;   // tokens of a tile: amortises the reductions of the softmax; its K and V stay in L1
constexpr int SLACK = 16;  // keys are scored 16 at a time: what lies past the end of a run is overwritten or masked

using Scores = float[KEYS + SLACK];

// Up to KEYS tokens of a context, as runs of tokens that are contiguous in the pool.
template <class T>
struct Tile {
  struct Run {
    const T* keys;
    int start;  // of the run within the tile
    int count;
  };
  Run runs[KEYS];
  int num_runs;
  int tokens;
  int64_t value_offset;

  void fill(const PagedKv<T>& kv, int begin, int end) {
    tokens = smaller(KEYS, end - begin);
    value_offset = kv.value_offset;
    num_runs = 0;
    for (int at = 0; at < tokens;) {
      const int count = smaller(kv.run(begin + at), tokens - at);
      runs[num_runs++] = {kv.key(begin + at), at, count};
      at += count;
    }
  }

  // Fetch rows `row` .. `row + count - 1` of a run (`offset` 0: of its keys, value_offset: of its values). A few at a
  // time, between the arithmetic: the core keeps no more than some 16 to 48 misses in flight and stalls on the next.
  PDS_INLINE void prefetch(int run, int row, int count, int64_t offset, int dim) const {
    if (run >= num_runs || row >= runs[run].count) return;
    const char* at = reinterpret_cast<const char*>(runs[run].keys + offset + int64_t{row} * dim);
    const int bytes = count * dim * static_cast<int>(sizeof(T));
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }
};

// The two products of attention in plain loops that the compiler turns into vector code. DIM 0: known at run time.
template <class T, int DIM>
struct PlainProducts {
  // scores[h][j] = <q[h], keys[j]>
  static void score(Scores* scores, const T* q, int group, const Tile<T>& tile, const Tile<T>& next, int dim) {
    const int n = DIM ? DIM : dim;
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int j = 0; j < run.count; j++) {
        next.prefetch(r, j, 1, 0, n);
        const T* key = run.keys + int64_t{j} * n;
        for (int h = 0; h < group; h++) {
          float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
          for (int d = 0; d < n; d++) dot += to_float(q[h * n + d]) * to_float(key[d]);
          scores[h][run.start + j] = dot;
        }
      }
    }
  }

  // out[h] += sum of weights[h][j] * values[j]
  static void weigh(float* out, const Scores* weights, int group, const Tile<T>& tile, const Tile<T>& next, int dim) {
    const int n = DIM ? DIM : dim;
    for (int r = 0; r < tile.num_runs; r++) {
      const auto& run = tile.runs[r];
      for (int j = 0; j < run.count; j++) {
        next.prefetch(r, j, 1, next.value_offset, n);
        const T* value = run.keys + tile.value_offset + int64_t{j} * n;
        for (int h = 0; h < group; h++) {
          const float weight = weights[h][run.start + j];
#pragma omp simd
          for (int d = 0; d < n; d++) out[h * n + d] += weight * to_float(value[d]);
        }
      }
    }
  }

  static void store(T* to, const float* out, float scale, int dim) {
    for (int d = 0; d < dim; d++) to[d] = from_float<T>(out[d] * scale);
  }
};

#if PDS_AVX512_BF16
#include "decode_bf16.h"
template <class T, int DIM>
struct BestProducts : PlainProducts<T, DIM> {};
template <>
struct BestProducts<bf16, 64> : Bf16Products<64> {};
template <>
struct BestProducts<bf16, 128> : Bf16Products<128> {};
#else
template <class T, int DIM>
using BestProducts = PlainProducts<T, DIM>;
#endif

// A part of the context of one (sequence, kv head).
struct DecodeItem {
  int sequence;
  int head;
  int begin;  // tokens
  int end;
};

// The running state of an item: for each query head the maximum (in units of log2), the sum, the unscaled output.
struct DecodeState {
  float* out;  // [group, dim], in the order that the products like
  float* max;  // [group]
  float* sum;  // [group]

  static size_t floats(int group, int dim) { return (size_t(group) * (dim + 2) + 15) / 16 * 16; }

  DecodeState(float* memory, int group, int dim)
      : out(memory), max(memory + size_t(group) * dim), sum(max + group) {}

  void reset(int group, int dim) {
    std::memset(out, 0, sizeof(float) * group * dim);
    for (int h = 0; h < group; h++) max[h] = LOWEST, sum[h] = 0.0f;
  }
};

// Turn the scores of a tile into weights and bring one head's state to its new maximum.
PDS_INLINE void online_softmax(float* scores, int tokens, float scale_log2, float& max, float& sum, float* out,
                               int dim) {
  for (int j = tokens; j < KEYS; j++) scores[j] = LOWEST;
  float top = max;
#pragma omp simd reduction(max : top)
  for (int j = 0; j < KEYS; j++) {
    scores[j] *= scale_log2;
    top = scores[j] > top ? scores[j] : top;
  }
  float tile_sum = 0.0f;
#pragma omp simd reduction(+ : tile_sum)
  for (int j = 0; j < KEYS; j++) {
    scores[j] = exp2_fast(scores[j] - top);
    tile_sum += scores[j];
  }
  const float shrink = exp2_fast(max - top);
  sum = sum * shrink + tile_sum;
  max = top;
  if (shrink == 1.0f) return;
#pragma omp simd
  for (int d = 0; d < dim; d++) out[d] *= shrink;
}

template <class T, int DIM>
class Decode {
  using Products = BestProducts<T, DIM>;

 public:
  Decode(T* out, const T* qkv, const Batch& batch, const Pool& pool, int layer, int heads, float scale)
      : out_(out), qkv_(qkv), batch_(batch), pool_(pool), layer_(layer), heads_(heads),
        group_(heads / pool.kv_heads), dim_(DIM ? DIM : pool.head_dim), scale_log2_(scale * LOG2_E) {}

  void run(const std::vector<int>& sequences, int threads) const {
    const int pairs = static_cast<int>(sequences.size()) * pool_.kv_heads;
    const int parts = pairs < threads ? ceil_div(threads, pairs) : 1;
    const std::vector<DecodeItem> items = split(sequences, parts);
    const size_t stride = DecodeState::floats(group_, dim_);
    static thread_local Scratch scratch;
    float* states = scratch.get<float>(stride * items.size());
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
      const int first = static_cast<int>(items.size() * thread / threads);
      const int last = static_cast<int>(items.size() * (thread + 1) / threads);
      walk(items.data() + first, items.data() + last, states + stride * first, stride);
    }
    for (int pair = 0; pair < pairs; pair++) {
      merge(items[size_t(pair) * parts], states + stride * parts * pair, parts, stride);
    }
  }

 private:
  std::vector<DecodeItem> split(const std::vector<int>& sequences, int parts) const {
    std::vector<DecodeItem> items;
    items.reserve(sequences.size() * pool_.kv_heads * parts);
    for (int s : sequences) {
      const int tokens = batch_.context_len[s];
      const int share = ceil_div(ceil_div(tokens, parts), KEYS) * KEYS;
      for (int head = 0; head < pool_.kv_heads; head++) {
        for (int part = 0; part < parts; part++) {
          items.push_back({s, head, smaller(part * share, tokens), smaller((part + 1) * share, tokens)});
        }
      }
    }
    return items;
  }

  void fill(Tile<T>& tile, const DecodeItem& item, int begin) const {
    tile.fill(PagedKv<T>(pool_, batch_, item.sequence, item.head, layer_), begin, item.end);
  }

  // Compute the states of [item, last), always with the tile that follows, perhaps of the next item, in view.
  void walk(const DecodeItem* item, const DecodeItem* last, float* states, size_t stride) const {
    alignas(64) Scores scores[MAX_GROUP];
    Tile<T> tiles[2];
    int now = 0;
    if (item != last) fill(tiles[now], *item, item->begin);
    for (; item != last; item++, states += stride) {
      DecodeState state(states, group_, dim_);
      state.reset(group_, dim_);
      const T* q = qkv_ + query_row(*item) * (heads_ + 2 * pool_.kv_heads) * dim_ + item->head * group_ * dim_;
      int at = item->begin;
      do {
        Tile<T>&tile = tiles[now], &next = tiles[1 - now];
        at += KEYS;
        next.num_runs = 0;
        if (at < item->end) {
          fill(next, *item, at);
        } else if (item + 1 != last) {
          fill(next, item[1], item[1].begin);
        }
        Products::score(scores, q, group_, tile, next, dim_);
        for (int h = 0; h < group_; h++) {
          online_softmax(scores[h], tile.tokens, scale_log2_, state.max[h], state.sum[h], state.out + h * dim_, dim_);
        }
        Products::weigh(state.out, scores, group_, tile, next, dim_);
        now = 1 - now;
      } while (at < item->end);
    }
  }

  // Bring the parts of one (sequence, kv head) to a common maximum, add them up, and write the result.
  void merge(const DecodeItem& item, float* states, int parts, size_t stride) const {
    DecodeState first(states, group_, dim_);
    for (int part = 1; part < parts; part++) {
      const DecodeState other(states + stride * part, group_, dim_);
      for (int h = 0; h < group_; h++) {
        const float top = first.max[h] > other.max[h] ? first.max[h] : other.max[h];
        const float ours = exp2_fast(first.max[h] - top), theirs = exp2_fast(other.max[h] - top);
        for (int d = h * dim_; d < (h + 1) * dim_; d++) first.out[d] = first.out[d] * ours + other.out[d] * theirs;
        first.sum[h] = first.sum[h] * ours + other.sum[h] * theirs;
        first.max[h] = top;
      }
    }
    T* to = out_ + (query_row(item) * heads_ + item.head * group_) * dim_;
    for (int h = 0; h < group_; h++) Products::store(to + h * dim_, first.out + h * dim_, 1.0f / first.sum[h], dim_);
  }

  int64_t query_row(const DecodeItem& item) const { return batch_.query_start[item.sequence]; }

  T* out_;
  const T* qkv_;
  const Batch& batch_;
  const Pool& pool_;
  int layer_;
  int heads_;
  int group_;
  int dim_;
  float scale_log2_;
};
