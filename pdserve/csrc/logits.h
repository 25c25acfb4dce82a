// One row of logits: its largest values, found without a sort, and its softmax, summed where it is needed only. A row of
// 49,152 stays in the second cache from one pass to the next. What is no number counts as masked.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "vector.h"

constexpr int SPAN = 64;         // logits of which the largest is noted

struct Candidate {
  float logit;
  int32_t id;
};

// In falling order, equal ones in order of token ids.
PDS_INLINE bool comes_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// A softmax's numerators, where that of the largest logit is 1; 0 below e^least.
struct Weigher {
  static constexpr float LEAST = -86.0f;  // weights below e^-86 are nothing beside 1
  float peak, temperature, least;

  template <class V>
  PDS_INLINE V operator()(V logit) const {
    const V scaled = logit == peak ? V{} : (logit - peak) / temperature;  // the peak may be infinite
    const V weight = exp_negative(max_of(scaled, V{} + LEAST));  // LEAST for what is no number, too
    return scaled >= least ? weight : V{};
  }
};

// Lanes summed in double.
class Mass {
 public:
  PDS_INLINE void add(Floats x) {
    Halves halves[2];
    std::memcpy(halves, &x, sizeof x);
    low_ += __builtin_convertvector(halves[0], Doubles);
    high_ += __builtin_convertvector(halves[1], Doubles);
  }
  PDS_INLINE void add(float x) { low_[0] += x; }
  PDS_INLINE double total() const {
    const Doubles both = low_ + high_;
    double sum = 0.0;
    for (int i = 0; i < LANES / 2; i++) sum += both[i];
    return sum;
  }

 private:
  typedef float Halves __attribute__((vector_size(LANES / 2 * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(LANES / 2 * sizeof(double))));
  Doubles low_{}, high_{};
};

// Logits of one row with the largest of each span of them.
class Row {
 public:
  Row(const float* logits, int vocab, Scratch& memory)
      : logits_(logits), vocab_(vocab), spans_(ceil_div(vocab, SPAN)), peaks_(memory.get<float>(2 * spans_)) {
    for (int s = 0; s < spans_; s++) {
      Floats most = Floats{} - INFINITY;
      float rest = -INFINITY;
      for_lanes(size_of(s), [&](int i, auto v) {
        using V = decltype(v);
        const V x = load_as<V>(begin_of(s) + i);
        if constexpr (std::is_same_v<V, float>) {
          rest = max_of(x, rest);
        } else {
          most = max_of(x, most);
        }
      });
      peaks_[s] = max_of(largest_lane(most), rest);
    }
    peak_ = *std::max_element(peaks_, peaks_ + spans_);
  }

  float peak() const { return peak_; }

  // The first of the largest.
  int likeliest() const {
    const int span = static_cast<int>(std::find(peaks_, peaks_ + spans_, peak_) - peaks_);
    for (int i = 0; i < size_of(span); i++) {
      if (begin_of(span)[i] == peak_) return span * SPAN + i;
    }
    return 0;
  }

  // A value that at least `count` logits reach, if that is not more than there are spans: the count-th of their peaks.
  float bound(int count) const {
    if (count > spans_) return -INFINITY;
    float* ordered = peaks_ + spans_;
    std::copy(peaks_, peaks_ + spans_, ordered);
    std::nth_element(ordered, ordered + count - 1, ordered + spans_, std::greater<float>());
    return ordered[count - 1];
  }

  // take(candidate, weight) for all logits from `bound` on, in order of their ids.
  template <class Take>
  PDS_INLINE void each_from(float bound, const Weigher& weigher, Take take) const {
    for (int s = 0; s < spans_; s++) {
      if (!(peaks_[s] >= bound)) continue;
      const float* logits = begin_of(s);
      float weights[SPAN];
      for_lanes(size_of(s), [&](int i, auto v) {
        using V = decltype(v);
        store_as<V>(weights + i, weigher(load_as<V>(logits + i)));
      });
      for (int i = 0; i < size_of(s); i++) {
        if (logits[i] >= bound) take(Candidate{logits[i], s * SPAN + i}, weights[i]);
      }
    }
  }

  double mass(const Weigher& weigher) const {
    Mass mass;
    for_lanes(vocab_, [&](int i, auto v) { mass.add(weigher(load_as<decltype(v)>(logits_ + i))); });
    return mass.total();
  }

  // The token at which the mass in order of token ids passes the share `uniform` of all of it.
  int in_order(const Weigher& weigher, double uniform, Scratch& memory) const {
    double* masses = memory.get<double>(spans_);
    double total = 0.0;
    for (int s = 0; s < spans_; s++) {
      Mass mass;
      for_lanes(size_of(s), [&](int i, auto v) { mass.add(weigher(load_as<decltype(v)>(begin_of(s) + i))); });
      total += masses[s] = mass.total();
    }
    const double drawn = uniform * total;
    double before = 0.0;
    int last = 0;  // of those that weigh anything: rounding may leave the sum at what was drawn
    for (int s = 0; s < spans_; s++) {
      if (before + masses[s] <= drawn && s + 1 < spans_) {
        before += masses[s];
        continue;
      }
      for (int i = 0; i < size_of(s); i++) {
        const float weight = weigher(begin_of(s)[i]);
        if (weight > 0.0f) last = s * SPAN + i;
        before += weight;
        if (before > drawn) return last;
      }
    }
    return last;
  }

  int above(float logit) const {
    Integers lanes{};
    int count = 0;
    for_lanes(vocab_, [&](int i, auto v) {
      using V = decltype(v);
      if constexpr (std::is_same_v<V, float>) {
        count += logits_[i] > logit;
      } else {
        lanes -= load_as<V>(logits_ + i) > logit;
      }
    });
    for (int i = 0; i < LANES; i++) count += lanes[i];
    return count;
  }

 private:
  const float* begin_of(int span) const { return logits_ + span * SPAN; }
  int size_of(int span) const { return smaller(SPAN, vocab_ - span * SPAN); }

  const float* logits_;
  int vocab_, spans_;
  float* peaks_;  // [spans], and as much room to order them
  float peak_;
};
