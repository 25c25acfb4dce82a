// Logits of a row in falling order, of which only as many are put in order as a question needs.
//
//   peak |--0--|--1--|--2--| ... |--255--| bound      intervals of equal width, each with its count and its mass
//
// What top_k, top_p and a draw look for lies in one interval, and that alone is sorted.
#pragma once

#include <cfloat>

#include "logits.h"

class Falling {
 public:
  // Of all logits from `bound` on. `memory` has to outlive it.
  Falling(const Row& row, const Weigher& weigher, float bound, int vocab, Scratch& memory)
      : candidates_(memory.get<Candidate>(2 * int64_t{vocab})), sorted_(candidates_ + vocab), weigher_(weigher) {
    bound = std::isfinite(row.peak()) ? max_of(bound, -FLT_MAX) : row.peak();
    const double width = double{row.peak()} - bound;
    scale_ = width > 0.0 ? INTERVALS / width : 0.0;  // else all are equal
    row.each_from(bound, weigher, [&](Candidate candidate, float weight) {
      const int at = interval(candidate);
      counts_[at]++;
      masses_[at] += weight;
      candidates_[num_candidates_++] = candidate;
    });
    for (const double mass : masses_) mass_ += mass;
  }

  bool empty() const { return num_candidates_ == 0; }
  double mass() const { return mass_; }

  // Leave the first `count`.
  void keep(int count) {
    for (int at = 0; at <= last_; at++) {
      if (counts_[at] >= count) return cut(at, count);
      count -= counts_[at];
    }
  }

  // Leave the fewest that have so much mass.
  void keep_mass(double mass) {
    const Place place = find([=](double sum) { return sum >= mass; });
    cut(place.interval, place.index + 1);
  }

  // The one at which the mass exceeds the share `uniform` of all that is left.
  int draw(double uniform) {
    const double drawn = uniform * mass_;
    const Place place = find([=](double sum) { return sum > drawn; });
    return sorted_[place.index].id;
  }

 private:
  static constexpr int INTERVALS = 256;

  struct Place {
    int interval;
    int index;  // among those of the interval
  };

  int interval(const Candidate& candidate) const {
    if (candidate.logit == weigher_.peak) return 0;
    return smaller(static_cast<int>((double{weigher_.peak} - candidate.logit) * scale_), INTERVALS - 1);
  }

  // Where the mass of all up to a place is `enough` first; the last that weighs anything, where rounding keeps it from
  // that.
  template <class Enough>
  PDS_INLINE Place find(Enough enough) {
    double mass = 0.0, before = 0.0;  // of all up to an interval, and of those before it
    Place place{0, 0};
    for (int at = 0; at <= last_ && !enough(mass); at++) {
      if (masses_[at] == 0.0) continue;
      place.interval = at;
      before = mass;
      mass += masses_[at];
    }
    sort(place.interval);
    for (int i = 0; i < counts_[place.interval] && !enough(before); i++) {
      const float weight = weigher_(sorted_[i].logit);
      if (weight > 0.0f) place.index = i;
      before += weight;
    }
    return place;
  }

  // Nothing behind the first `count` of an interval is left.
  void cut(int at, int count) {
    sort(at);
    last_ = at;
    counts_[at] = count;
    masses_[at] = mass_ = 0.0;
    for (int i = 0; i < count; i++) masses_[at] += weigher_(sorted_[i].logit);
    for (int i = 0; i <= at; i++) mass_ += masses_[i];
  }

  // Put all of an interval into sorted_.
  void sort(int at) {
    if (at == sorted_interval_) return;
    Candidate* end = sorted_;
    for (int i = 0; i < num_candidates_; i++) {
      if (interval(candidates_[i]) == at) *end++ = candidates_[i];
    }
    std::sort(sorted_, end, comes_before);
    sorted_interval_ = at;
  }

  Candidate *candidates_, *sorted_;  // [vocab] each, in order of token ids and in falling order
  const Weigher weigher_;
  double scale_;  // intervals a unit of the logits
  int num_candidates_ = 0;
  int last_ = INTERVALS - 1;  // the last interval that is left
  int sorted_interval_ = -1;
  double mass_ = 0.0;         // of what is left
  double masses_[INTERVALS] = {};
  int32_t counts_[INTERVALS] = {};
};
