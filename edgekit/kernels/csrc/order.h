// The order of one token's sparse attention: estimates of a unit's segments, then its choice, then attention to its segments.
//
// Threads take pieces from both ends of a loop. Whoever makes a unit's last estimate chooses for it, and nobody waits for other
// units' choices: attention to a unit begins when it has chosen, beside estimates and choices of others.
#pragma once

#include <algorithm>
#include <cstdint>

#include "work.h"

namespace edgekit {
namespace {

class Order {
 public:
  Order(int64_t units, int64_t segments) : units_(units), segments_(segments), ends_(uint64_t(units * segments) << 32) {
    left_ = scratch<int64_t, Use::kLeft>(static_cast<size_t>(2 * units));
    taken_ = left_ + units;
    std::fill(left_, left_ + units, segments);
    std::fill(taken_, taken_ + units, 0);
  }

  // Of estimates and attention together.
  size_t count() const { return static_cast<size_t>(2 * units_ * segments_); }

  // Do one piece, in the call for i of a loop of count(). `work` has estimate(unit, segment), choose(unit) and attend(unit, segment).
  template <class Work>
  void take(size_t i, const Work& work) {
    const bool first = i < count() / 2;
    if (const int64_t at = take_estimate(first); at >= 0) {
      const Piece p = piece(at);
      work.estimate(p.unit, p.segment);
      if (__atomic_sub_fetch(left_ + p.unit, 1, __ATOMIC_ACQ_REL) > 0) return;
      work.choose(p.unit);
      return __atomic_store_n(left_ + p.unit, kChosen, __ATOMIC_RELEASE);
    }
    // There is a piece for each call, so one is there or will be when who chooses has chosen.
    for (int turns = 0;; ++turns) {
      for (int64_t k = 0; k < units_; ++k) {
        const int64_t unit = first ? k : units_ - 1 - k;
        if (__atomic_load_n(left_ + unit, __ATOMIC_ACQUIRE) != kChosen) continue;
        if (__atomic_load_n(taken_ + unit, __ATOMIC_RELAXED) >= segments_) continue;
        const int64_t segment = __atomic_fetch_add(taken_ + unit, 1, __ATOMIC_RELAXED);
        if (segment < segments_) return work.attend(unit, segment);
      }
      rest(turns);
    }
  }

 private:
  struct Piece {
    int64_t unit, segment;
  };
  static constexpr int64_t kChosen = -1;

  // Estimates first..end - 1 are left: `first` in the lower half of ends_, `end` in the upper.
  int64_t take_estimate(bool first) {
    uint64_t ends = __atomic_load_n(&ends_, __ATOMIC_RELAXED);
    while (static_cast<uint32_t>(ends) < ends >> 32) {
      const uint64_t less = first ? ends + 1 : ends - (uint64_t{1} << 32);
      if (__atomic_compare_exchange_n(&ends_, &ends, less, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        return static_cast<int64_t>(first ? static_cast<uint32_t>(ends) : (ends >> 32) - 1);
      }
    }
    return -1;
  }

  // A unit that both ends share comes first, at either end, so that one of them can choose for it while there is other work;
  // and either finds a unit's segments in the order of memory.
  Piece piece(int64_t i) const {
    const int64_t pieces = units_ * segments_;
    if (i < (pieces + 1) / 2) return piece_from(i, (segments_ + 1) / 2);
    const Piece other = piece_from(pieces - 1 - i, segments_ / 2);
    return {units_ - 1 - other.unit, 2 * other.unit + 1 == units_ ? segments_ - 1 - other.segment : other.segment};
  }
  // The first `half` of a unit in the middle come first, if there is one.
  Piece piece_from(int64_t i, int64_t half) const {
    const int64_t shared = units_ % 2 ? half : 0;
    if (i < shared) return {units_ / 2, i};
    return {(i - shared) / segments_, (i - shared) % segments_};
  }

  int64_t units_, segments_;
  alignas(64) uint64_t ends_;
  int64_t* left_;   // [units]: estimates that are not made; kChosen
  int64_t* taken_;  // [units]: segments that somebody attends to
};

}  // namespace
}  // namespace edgekit
