// The order of one token's sparse attention: a key-value head's queries and key are read, then estimates of its units' segments
// made, then each unit chooses, then its segments are attended to, and joined.
//
// Threads take pieces from both ends of a loop. Whoever makes a unit's last estimate chooses for it, whoever attends to its last
// segment joins them, and nobody waits for other units: attention to one goes on beside estimates and choices of others.
#pragma once

#include <algorithm>
#include <cstdint>

#include "work.h"

namespace edgekit {
namespace {

class Order {
 public:
  // `units` are a multiple of `heads`.
  Order(int64_t heads, int64_t units, int64_t segments)
      : heads_(heads), units_(units), segments_(segments), reads_(static_cast<size_t>(heads)),
        estimates_(static_cast<size_t>(units * segments)) {
    left_ = scratch<int64_t, Use::kLeft>(static_cast<size_t>(heads + 3 * units));
    apart_ = left_ + units;
    taken_ = apart_ + units;
    read_ = taken_ + units;
    std::fill(left_, taken_, segments);
    std::fill(taken_, read_ + heads, 0);
  }

  size_t count() const { return static_cast<size_t>(heads_ + 2 * units_ * segments_); }

  // Do one piece, in the call for i of a loop of count(): read(head), or estimate(unit, segment), choose(unit),
  // attend(unit, segment) and join(unit) of `work`.
  template <class Read, class Work>
  void take(size_t i, const Read& read, const Work& work) {
    const bool first = i < count() / 2;
    if (const int64_t at = reads_.take(first); at >= 0) {
      // A head in the middle comes first, as its units do.
      const int64_t middle = heads_ % 2 ? heads_ / 2 : -1, head = at > middle ? at : at == 0 ? middle : at - 1;
      read(head);
      return __atomic_store_n(read_ + head, 1, __ATOMIC_RELEASE);
    }
    if (const int64_t at = estimates_.take(first); at >= 0) {
      const auto [unit, segment] = piece(at);
      const int64_t* ready = read_ + unit * heads_ / units_;
      for (int turns = 0; __atomic_load_n(ready, __ATOMIC_ACQUIRE) == 0; ++turns) rest(turns);
      work.estimate(unit, segment);
      if (__atomic_sub_fetch(left_ + unit, 1, __ATOMIC_ACQ_REL) > 0) return;
      work.choose(unit);
      return __atomic_store_n(left_ + unit, kChosen, __ATOMIC_RELEASE);
    }
    // There is a piece for each call, so one is there or will be when who chooses has chosen.
    for (int turns = 0;; ++turns) {
      for (int64_t k = 0; k < units_; ++k) {
        const int64_t unit = first ? k : units_ - 1 - k;
        if (__atomic_load_n(left_ + unit, __ATOMIC_ACQUIRE) != kChosen) continue;
        if (__atomic_load_n(taken_ + unit, __ATOMIC_RELAXED) >= segments_) continue;
        const int64_t segment = __atomic_fetch_add(taken_ + unit, 1, __ATOMIC_RELAXED);
        if (segment >= segments_) continue;
        work.attend(unit, segment);
        if (__atomic_sub_fetch(apart_ + unit, 1, __ATOMIC_ACQ_REL) == 0) work.join(unit);
        return;
      }
      rest(turns);
    }
  }

 private:
  struct Piece {
    int64_t unit, segment;
  };
  static constexpr int64_t kChosen = -1;

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

  int64_t heads_, units_, segments_;
  alignas(64) Ends reads_, estimates_;
  int64_t* left_;   // [units]: estimates that are not made; kChosen
  int64_t* apart_;  // [units]: segments that are not attended to
  int64_t* taken_;  // [units]: segments that somebody attends to
  int64_t* read_;   // [heads]: 1 when it was read
};

}  // namespace
}  // namespace edgekit
