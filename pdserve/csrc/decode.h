// Decode attention: one query row per sequence, bound by reading KV from memory.
//
// All query heads of a kv head are taken together, so each line of K and V is read once. A context is walked in tiles
// of KEYS tokens with an online softmax (Milakov and Gimelshein, arXiv 1805.02867) while the tile after it is
// prefetched: neighbouring blocks lie far apart, where the hardware prefetcher does not follow. With more threads than
// (sequence, kv head) pairs a context is split and the parts are merged (flash decoding).
#pragma once

#include <vector>

#include "decode_tile.h"
#include "vector.h"

// A part of the context of one (sequence, kv head).
struct DecodeItem {
  int sequence;
  int head;
  int begin;  // tokens
  int end;
};

// The running state of an item: for each query head the maximum (in units of log2), the sum, the unscaled output.
struct DecodeState {
  float* out;  // [heads, dim], in the order that the products like
  float* max;  // [heads]
  float* sum;  // [heads]

  DecodeState(float* memory, int heads, int dim) : out(memory), max(memory + heads * dim), sum(max + heads) {}

  static size_t floats(int heads, int dim) { return (size_t(heads) * (dim + 2) + 15) / 16 * 16; }

  void reset(int heads, int dim) {
    std::memset(out, 0, sizeof(float) * heads * dim);
    for (int h = 0; h < heads; h++) max[h] = LOWEST, sum[h] = 0.0f;
  }
};

// Turn the scores of a tile, of which the first `skip` and those past `tokens` do not count, into weights and bring one
// head's state to its new maximum.
PDS_INLINE void online_softmax(float* scores, int skip, int tokens, float scale_log2, float& max, float& sum,
                               float* out, int dim) {
  for (int j = 0; j < skip; j++) scores[j] = LOWEST;
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
  for_lanes(dim, [=](int d, auto v) { store_as<decltype(v)>(out + d, load_as<decltype(v)>(out + d) * shrink); });
}

template <class T, class Products>
class Decode {
 public:
  Decode(T* out, const T* qkv, const Batch& batch, const Pool& pool, const Shape& shape)
      : out_(out),
        qkv_(qkv),
        batch_(batch),
        pool_(pool),
        shape_(shape),
        heads_(shape.heads),
        group_(heads_ / pool.kv_heads),
        padded_(ceil_div(group_, Products::HEADS) * Products::HEADS),
        dim_(pool.head_dim),
        scale_log2_(shape.scale * LOG2_E) {}

  void run(const std::vector<int>& sequences, int threads) const {
    const int pairs = static_cast<int>(sequences.size()) * pool_.kv_heads;
    const int parts = pairs < threads ? ceil_div(threads, pairs) : 1;
    const std::vector<DecodeItem> items = split(sequences, parts);
    const size_t stride = DecodeState::floats(padded_, dim_);
    float* states = of_this_thread<Scratch>().get<float>(stride * items.size());
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
      const int first = first_key(s) / KEYS * KEYS;  // whole tiles, whose blocks are whole too
      const int share = ceil_div(ceil_div(tokens - first, parts), KEYS) * KEYS;
      for (int head = 0; head < pool_.kv_heads; head++) {
        for (int part = 0; part < parts; part++) {
          const int begin = first + part * share;
          items.push_back({s, head, smaller(begin, tokens), smaller(begin + share, tokens)});
        }
      }
    }
    return items;
  }

  int first_key(int sequence) const { return shape_.first_key(batch_.context_len[sequence] - 1); }

  void fill(Tile<T>& tile, const DecodeItem& item, int begin) const {
    tile.fill(PagedKv<T>(pool_, batch_, item.sequence, item.head, shape_.layer), begin, item.end);
  }

  // Such that they come out soft-capped once they are scaled.
  void soften_scores(Scores* scores) const {
    const float inner = shape_.scale / shape_.softcap;
    for (int h = 0; h < group_; h++) soften(scores[h], KEYS, inner, 1.0f / inner);
  }

  // Compute the states of [item, last), always with the tile that follows, perhaps of the next item, in view.
  void walk(const DecodeItem* item, const DecodeItem* last, float* states, size_t stride) const {
    const typename Products::Scope scope;
    alignas(64) Scores scores[MAX_GROUP];
    Products products(group_, dim_);
    Tile<T> tiles[2];
    int now = 0;
    if (item != last) fill(tiles[now], *item, item->begin);
    for (; item != last; item++, states += stride) {
      DecodeState state(states, padded_, dim_);
      state.reset(padded_, dim_);
      products.begin(qkv_ + query_row(*item) * (heads_ + 2 * pool_.kv_heads) * dim_ + item->head * group_ * dim_);
      int at = item->begin;
      const int first = first_key(item->sequence);
      do {
        Tile<T>&tile = tiles[now], &next = tiles[1 - now];
        const int skip = larger(first - at, 0);
        at += KEYS;
        next.num_runs = 0;
        if (at < item->end) {
          fill(next, *item, at);
        } else if (item + 1 != last) {
          fill(next, item[1], item[1].begin);
        }
        products.score(scores, tile, next);
        if (shape_.softcap != 0.0f) soften_scores(scores);
        for (int h = 0; h < group_; h++) {
          float* out = state.out + h * dim_;
          online_softmax(scores[h], skip, tile.tokens, scale_log2_, state.max[h], state.sum[h], out, dim_);
        }
        products.weigh(state.out, scores, tile, next);
        now = 1 - now;
      } while (at < item->end);
    }
  }

  // Bring the parts of one (sequence, kv head) to a common maximum, add them up, and write the result.
  void merge(const DecodeItem& item, float* states, int parts, size_t stride) const {
    DecodeState first(states, padded_, dim_);
    for (int part = 1; part < parts; part++) {
      const DecodeState other(states + stride * part, padded_, dim_);
      for (int h = 0; h < group_; h++) {
        const float top = first.max[h] > other.max[h] ? first.max[h] : other.max[h];
        const float ours = exp2_fast(first.max[h] - top), theirs = exp2_fast(other.max[h] - top);
        for (int d = h * dim_; d < (h + 1) * dim_; d++) first.out[d] = first.out[d] * ours + other.out[d] * theirs;
        first.sum[h] = first.sum[h] * ours + other.sum[h] * theirs;
        first.max[h] = top;
      }
    }
    T* to = out_ + (query_row(item) * heads_ + item.head * group_) * dim_;
    const Products products(group_, dim_);
    for (int h = 0; h < group_; h++) products.store(to + h * dim_, first.out + h * dim_, 1.0f / first.sum[h]);
  }

  int64_t query_row(const DecodeItem& item) const { return batch_.query_start[item.sequence]; }

  T* out_;
  const T* qkv_;
  const Batch& batch_;
  const Pool& pool_;
  Shape shape_;
  int heads_;
  int group_;   // query heads of a kv head
  int padded_;  // the same, rounded up to what the products want
  int dim_;
  float scale_log2_;
};
