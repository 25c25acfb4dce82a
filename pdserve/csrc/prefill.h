// Prefill attention: many query rows of one sequence, bound by arithmetic.
//
// Of one (sequence, kv head), K and V are gathered once into the form that the products want. Then COLS columns, each
// one (query, head) pair of the group, are swept over the keys, KEY_BLOCK at a time. Everything is transposed: scores
// are S^T = K Q^T [keys, COLS] and the output is O^T = V^T P^T [dim, COLS], so that a lane is a column and the softmax
// needs no operation across lanes.
#pragma once

#include <vector>

#include "prefill_amx.h"
#include "prefill_bf16.h"
#include "prefill_plain.h"

struct PrefillItem {
  int sequence;
  int head;
  int begin;  // columns
  int end;
};

template <class T, class Chunk>
class Prefill {
  static constexpr int COLS = Chunk::COLS;

 public:
  Prefill(T* out, const T* qkv, const Batch& batch, const Pool& pool, const Shape& shape)
      : out_(out),
        qkv_(qkv),
        batch_(batch),
        pool_(pool),
        shape_(shape),
        heads_(shape.heads),
        group_(heads_ / pool.kv_heads),
        scale_log2_(shape.scale * LOG2_E) {}

  void run(const std::vector<int>& sequences, int threads) const {
    // Each part gathers K and V again, which is cheap beside a few hundred columns.
    const int pairs = static_cast<int>(sequences.size()) * pool_.kv_heads;
    const int parts = threads > 1 ? ceil_div(2 * threads, pairs) : 1;
    std::vector<PrefillItem> items;
    items.reserve(size_t(pairs) * parts);
    for (int s : sequences) {
      const int columns = (batch_.query_start[s + 1] - batch_.query_start[s]) * group_;
      const int share = ceil_div(ceil_div(columns, parts), COLS) * COLS;
      for (int head = 0; head < pool_.kv_heads; head++) {
        for (int at = 0; at < columns; at += share) items.push_back({s, head, at, smaller(at + share, columns)});
      }
    }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) attend(items[i]);
  }

 private:
  void attend(const PrefillItem& item) const {
    Chunk& chunk = of_this_thread<Chunk>();
    const typename Chunk::Scope scope;
    const int64_t row = batch_.query_start[item.sequence];
    const int rows = batch_.query_start[item.sequence + 1] - static_cast<int>(row);
    const int first_position = batch_.context_len[item.sequence] - rows;
    const int dim = pool_.head_dim, first_dim = item.head * group_ * dim;
    const int64_t q_width = int64_t{heads_ + 2 * pool_.kv_heads} * dim, out_width = int64_t{heads_} * dim;
    const Columns<const T> queries{qkv_ + row * q_width + first_dim, q_width, group_, dim, rows * group_};
    const Columns<T> out{out_ + row * out_width + first_dim, out_width, group_, dim, rows * group_};

    const int last_position = first_position + (item.end - 1) / group_;
    const int first_key = shape_.first_key(first_position + item.begin / group_);
    const PagedKv<T> kv(pool_, batch_, item.sequence, item.head, shape_.layer);
    chunk.gather(kv, first_key, last_position + 1 - first_key);
    for (int c = item.begin; c < item.end; c += COLS) {
      chunk.take(queries, c);
      sweep(chunk, first_position + c / group_ - first_key, c % group_, smaller(COLS, item.end - c));
      chunk.finish(out, c, smaller(COLS, item.end - c));
    }
  }

  // Columns c .. c + columns - 1 over all keys they may attend to; leaves the output in the chunk. Positions and keys
  // count from the first gathered key. A column whose keys so far are all masked has weighed them with 1: its first
  // real score shrinks that to nothing.
  void sweep(Chunk& chunk, int position, int head, int columns) const {
    alignas(64) int32_t limits[COLS];  // the position of each column; spare columns repeat the last
    for (int c = 0; c < COLS; c++) limits[c] = position + (head + smaller(c, columns - 1)) / group_;
    const int end = limits[COLS - 1] + 1;
    Floats max[COLS / LANES], sum[COLS / LANES];
    for (int v = 0; v < COLS / LANES; v++) max[v] = Floats{} + LOWEST, sum[v] = Floats{};
    std::memset(chunk.out, 0, sizeof(float) * pool_.head_dim * COLS);
    const int begin = shape_.first_key(position) / KEY_BLOCK * KEY_BLOCK;
    for (int key = begin; key < end; key += KEY_BLOCK) {
      const int count = smaller(KEY_BLOCK, ceil_div(end - key, KEY_PAD) * KEY_PAD);
      chunk.score(key, count);
      if (shape_.softcap != 0.0f) soften_scores(chunk.scores, count);
      if (key + count > position + 1) mask_future(chunk.scores, limits, key, count);
      if (key < shape_.first_key(end - 1)) mask_past(chunk.scores, limits, key, count);
      for (int v = 0; v < COLS / LANES; v++) softmax(chunk, v, count, max[v], sum[v]);
      chunk.weigh(key, count);
    }
    for (int v = 0; v < COLS / LANES; v++) scale_out(chunk, v, 1.0f / sum[v]);
  }

  // Such that they come out soft-capped once they are scaled.
  void soften_scores(float* scores, int count) const {
    const float inner = shape_.scale / shape_.softcap;
    soften(scores, count * COLS, inner, 1.0f / inner);
  }

  static void mask_future(float* scores, const int32_t* limits, int key, int count) {
    for (int v = 0; v < COLS; v += LANES) {
      Integers limit;
      std::memcpy(&limit, limits + v, sizeof limit);
      for (int k = 0; k < count; k++) {
        float* at = scores + k * COLS + v;
        store_floats(at, key + k > limit ? Floats{} + LOWEST : load_floats(at));
      }
    }
  }

  // What has left the window.
  void mask_past(float* scores, const int32_t* limits, int key, int count) const {
    for (int v = 0; v < COLS; v += LANES) {
      Integers limit;
      std::memcpy(&limit, limits + v, sizeof limit);
      limit -= shape_.window;
      for (int k = 0; k < count; k++) {
        float* at = scores + k * COLS + v;
        store_floats(at, key + k <= limit ? Floats{} + LOWEST : load_floats(at));
      }
    }
  }

  // One vector of columns: scores to weights, the state to the new maximum.
  PDS_INLINE void softmax(Chunk& chunk, int v, int count, Floats& max, Floats& sum) const {
    const float* scores = chunk.scores + v * LANES;
    Floats tops[4] = {max, max, max, max};  // one chain of maxima would wait for itself
    for (int k = 0; k < count; k += 4) {
      PDS_UNROLL
      for (int i = 0; i < 4; i++) tops[i] = max_of(tops[i], load_floats(scores + (k + i) * COLS) * scale_log2_);
    }
    const Floats top = max_of(max_of(tops[0], tops[1]), max_of(tops[2], tops[3]));
    Floats block_sum{};
    for (int k = 0; k < count; k += 2) {
      const Floats even = exp2_fast(load_floats(scores + k * COLS) * scale_log2_ - top);
      const Floats odd = exp2_fast(load_floats(scores + (k + 1) * COLS) * scale_log2_ - top);
      block_sum += even + odd;
      chunk.put(k, v, even, odd);
    }
    const Floats shrink = exp2_fast(max - top);
    sum = sum * shrink + block_sum;
    max = top;
    scale_out(chunk, v, shrink);
  }

  PDS_INLINE void scale_out(Chunk& chunk, int v, Floats factor) const {
    for (int d = 0; d < pool_.head_dim; d++) {
      float* at = chunk.out + d * COLS + v * LANES;
      store_floats(at, load_floats(at) * factor);
    }
  }

  T* out_;
  const T* qkv_;
  const Batch& batch_;
  const Pool& pool_;
  Shape shape_;
  int heads_;
  int group_;
  float scale_log2_;
};
