// The next token of a row of logits, and what the model thought of it: defined in pdserve/engine/sampler.py, computed with
// torch by pdserve/engine/torch_sampler.py.
//
//   logits ── bias, tokens that may not come, penalties ──> a copy, where there is any of them
//     the largest of each span ──> a bound below all that top_k or top_p can keep
//     the few from that bound on, in intervals ──> the one at which their mass, in falling order, passes the number drawn
#pragma once

#include "falling.h"

// How to sample one row: `_ROW` of pdserve/engine/native_sampler.py.
struct SamplingRow {
  const float* logits;     // [vocab]
  const uint8_t* allowed;  // [vocab], 0 where a token may not come; null: all may
  const int64_t* bias_ids;
  const float* biases;  // added to the logits of those
  const int64_t* held_ids;
  const int64_t* counted_ids;  // distinct tokens of prompt and output
  const float* in_output;      // how often each of them stands in the output
  double top_p, uniform;
  float temperature, least;  // `least`: the logarithm of min_p
  float presence_penalty, frequency_penalty, repetition_penalty;
  int32_t num_bias, num_held, num_counted;
  int32_t top_k;  // 1 to vocab
  int32_t greedy;
};

// Memory of a thread.
struct SamplerMemory {
  Scratch adjusted, peaks, candidates, masses;
};

// Of the reference's float32 operations each is rounded by itself: a product in double is exact, so that nothing can be
// fused.
PDS_INLINE float penalised(float logit, float in_output, const SamplingRow& row) {
  if (row.repetition_penalty != 1.0f) {
    logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  }
  const float frequency = static_cast<float>(double{row.frequency_penalty} * in_output);
  const float presence = in_output > 0.0f ? row.presence_penalty : 0.0f;
  return logit - (frequency + presence);
}

// The logits that are sampled from: the row's own, or a copy. Null where a token id lies outside the vocabulary.
PDS_INLINE const float* adjusted(const SamplingRow& row, int vocab, Scratch& memory) {
  const auto outside = [vocab](int64_t id) { return id < 0 || id >= vocab; };
  if (std::any_of(row.bias_ids, row.bias_ids + row.num_bias, outside) ||
      std::any_of(row.held_ids, row.held_ids + row.num_held, outside) ||
      std::any_of(row.counted_ids, row.counted_ids + row.num_counted, outside)) {
    return nullptr;
  }
  if (row.allowed == nullptr && row.num_bias + row.num_held + row.num_counted == 0) return row.logits;
  float* logits = memory.get<float>(vocab);
  std::memcpy(logits, row.logits, vocab * sizeof(float));
  for (int i = 0; i < row.num_bias; i++) logits[row.bias_ids[i]] += row.biases[i];
  for (int i = 0; i < row.num_held; i++) logits[row.held_ids[i]] = -INFINITY;
  for (int i = 0; i < row.num_counted; i++) {
    float& logit = logits[row.counted_ids[i]];
    logit = penalised(logit, row.in_output[i], row);
  }
  if (row.allowed != nullptr) {
    for (int i = 0; i < vocab; i++) logits[i] = row.allowed[i] != 0 ? logits[i] : -INFINITY;
  }
  return logits;
}

// Logits below it weigh nothing, or cannot be among those that top_k or else top_p leave. `mass` is that of the row.
PDS_INLINE float lower_bound(const SamplingRow& row, const Row& logits, const Weigher& weigher, double mass, int vocab) {
  // All tokens that weigh less than e^least have less than 1 - top_p of the mass together, whatever rounding does.
  double least = 1.000001 * weigher.least;
  if (row.top_k == vocab) least = std::max(least, std::log(0.99 * (1.0 - row.top_p) * mass / vocab));
  const float bound = std::nextafter(static_cast<float>(double{weigher.peak} + weigher.temperature * least), -INFINITY);
  return row.top_k < vocab ? max_of(bound, logits.bound(row.top_k)) : bound;
}

// The token; -1 where a token id of the row lies outside the vocabulary.
inline int64_t choose(const SamplingRow& row, int vocab) {
  SamplerMemory& memory = of_this_thread<SamplerMemory>();
  const float* values = adjusted(row, vocab, memory.adjusted);
  if (values == nullptr) return -1;
  const Row logits(values, vocab, memory.peaks);
  if (row.greedy) return logits.likeliest();
  const Weigher weigher{logits.peak(), row.temperature, max_of(row.least, Weigher::LEAST)};
  if (row.top_k == vocab && row.top_p >= 1.0) return logits.in_order(weigher, row.uniform, memory.masses);

  double mass = row.top_k < vocab ? 1.0 : logits.mass(weigher);
  Falling falling(logits, weigher, lower_bound(row, logits, weigher, mass, vocab), vocab, memory.candidates);
  if (falling.empty()) return 0;
  if (row.top_k < vocab) {
    falling.keep(row.top_k);
    mass = falling.mass();
  }
  if (row.top_p < 1.0) falling.keep_mass(row.top_p * mass);
  return falling.draw(row.uniform);
}

// Of one token of a row [vocab], and of the num_top likeliest: natural logarithms of the softmax.
struct Description {
  float* logprob;
  int32_t* rank;  // 1: none is likelier
  int32_t* top_ids;  // [num_top], falling
  float* top_logprobs;
};

inline void describe(const float* values, int vocab, int64_t token, int num_top, const Description& into) {
  SamplerMemory& memory = of_this_thread<SamplerMemory>();
  const Row logits(values, vocab, memory.peaks);
  const Weigher weigher{logits.peak(), 1.0f, Weigher::LEAST};
  const double total = logits.peak() + std::log(logits.mass(weigher));
  *into.logprob = static_cast<float>(values[token] - total);
  *into.rank = logits.above(values[token]) + 1;
  Candidate* candidates = memory.candidates.get<Candidate>(vocab);
  int found = 0;
  if (num_top > 0) {
    logits.each_from(logits.bound(num_top), weigher, [&](Candidate candidate, float) { candidates[found++] = candidate; });
    std::partial_sort(candidates, candidates + smaller(found, num_top), candidates + found, comes_before);
  }
  for (int i = 0; i < num_top; i++) {
    into.top_ids[i] = i < found ? candidates[i].id : 0;  // where too many are no number
    into.top_logprobs[i] = i < found ? static_cast<float>(candidates[i].logit - total) : NAN;
  }
}
