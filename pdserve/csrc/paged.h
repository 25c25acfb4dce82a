// The batch and the paged pool as Python hands them over.
#pragma once

#include <algorithm>

#include "common.h"

// Limits that Python checks before it calls.
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_GROUP = 64;  // query heads of one kv head

// pdserve.kernels.base.Batch, and its sizes.
struct Batch {
  const int32_t* positions;     // [tokens]
  const int32_t* query_start;   // [sequences + 1]
  const int32_t* context_len;   // [sequences]
  const int32_t* block_tables;  // [sequences, max_blocks]
  int32_t tokens;
  int32_t sequences;
  int32_t max_blocks;
};

inline int sequence_of(const Batch& batch, int token) {
  return static_cast<int>(std::upper_bound(batch.query_start, batch.query_start + batch.sequences + 1, token) -
                          batch.query_start) -
         1;
}

// `[num_blocks, kv_heads, layers, 2, block_size, head_dim]`; strides in elements.
struct Pool {
  void* data;
  int64_t block_stride;
  int64_t head_stride;
  int32_t num_blocks;
  int32_t kv_heads;
  int32_t layers;
  int32_t block_size;
  int32_t head_dim;
};

// What a layer's attention looks like.
struct Shape {
  int32_t layer;
  int32_t heads;
  float scale;
  float softcap;   // scores become softcap * tanh(score / softcap); 0: they stay
  int32_t window;  // a token attends to so many, itself included; 0: to all before it

  // The first token that the one at `position` attends to.
  PDS_INLINE int first_key(int position) const { return window > 0 ? larger(position - window + 1, 0) : 0; }
};

// The pool as one (kv head, layer) of one sequence sees it.
template <class T>
struct PagedKv {
  const T* base;
  const int32_t* table;
  int64_t block_stride;
  int64_t value_offset;  // from a key to its value
  int32_t block_size;
  int32_t head_dim;

  PagedKv(const Pool& pool, const Batch& batch, int sequence, int head, int layer)
      : base(static_cast<const T*>(pool.data) + head * pool.head_stride +
             int64_t{2} * layer * pool.block_size * pool.head_dim),
        table(batch.block_tables + int64_t{sequence} * batch.max_blocks),
        block_stride(pool.block_stride),
        value_offset(int64_t{pool.block_size} * pool.head_dim),
        block_size(pool.block_size),
        head_dim(pool.head_dim) {}

  // Keys of consecutive tokens are contiguous within a block: the address of `token` and how many follow it there.
  PDS_INLINE const T* key(int token) const {
    return base + table[token / block_size] * block_stride + int64_t{token % block_size} * head_dim;
  }
  PDS_INLINE int run(int token) const { return block_size - token % block_size; }
};
