// Threads that stay together for several loops, one after the other: one leads, the others help with the pieces of its loops,
// and fetch what it will read next while it does what cannot be shared.
//
// A token's products are a few microseconds each, which is what entering and leaving the session's pool costs, and memory
// rests all that time. So a layer enters the pool once. Nobody waits for a helper that did not come: a leader takes
// all pieces that nobody else took.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "session.h"
#include "work.h"

namespace edgekit {

class Team final : public ort::Pool {
 public:
  // Each member calls it once: who is first leads, the others return when it has led.
  template <class Lead>
  void join(const Lead& lead) {
    if (members_.fetch_add(1, std::memory_order_relaxed) > 0) return help();
    lead();
    left_.store(kOver, std::memory_order_release);
  }

  void run(size_t count, void (*piece)(void*, size_t), void* user) const override {
    piece_ = piece;
    user_ = user;
    done_.store(0, std::memory_order_relaxed);
    left_.store(uint64_t{count} << 32, std::memory_order_release);
    for (int64_t i = take_first(); i >= 0; i = take_first()) {
      piece(user, static_cast<size_t>(i));
      done_.fetch_add(1, std::memory_order_relaxed);
    }
    for (int turns = 0; done_.load(std::memory_order_acquire) != count; ++turns) rest(turns);
  }
  void expect(ort::Bytes next) const override {
    // The end of it, where helpers begin.
    const uint8_t* end = next.begin + next.count;
    next_end_.store(end, std::memory_order_relaxed);
    next_.store(end - std::min(next.count, kMostAhead), std::memory_order_release);
  }
  bool enters_at_once() const override { return true; }

 private:
  static constexpr uint64_t kOver = ~uint64_t{0};
  static constexpr int64_t kMostAhead = 1 << 19;  // what a second cache keeps
  static constexpr int kLines = 4;

  // Pieces first..end - 1 are left: `first` in the lower half of left_, `end` in the upper. The leader takes the first, helpers
  // the last, so that each finds what it fetched.
  int64_t take_first() const {
    uint64_t left = left_.load(std::memory_order_relaxed);
    while (static_cast<uint32_t>(left) < left >> 32) {
      if (left_.compare_exchange_weak(left, left + 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        return static_cast<uint32_t>(left);
      }
    }
    return -1;
  }
  void help() {
    const uint8_t *seen = nullptr, *begin = nullptr, *at = nullptr;
    for (int turns = 0;; ++turns) {
      uint64_t left = left_.load(std::memory_order_acquire);
      if (left == kOver) return;
      if (static_cast<uint32_t>(left) < left >> 32) {
        if (!left_.compare_exchange_weak(left, left - (uint64_t{1} << 32), std::memory_order_acquire, std::memory_order_relaxed)) continue;
        piece_(user_, (left >> 32) - 1);
        done_.fetch_add(1, std::memory_order_release);
        turns = 0;
        continue;
      }
      if (const uint8_t* next = next_.load(std::memory_order_acquire); next != seen) {
        seen = begin = next;
        at = next_end_.load(std::memory_order_relaxed);
      }
      if (at <= begin) {
        rest(turns);
        continue;
      }
      for (int line = 0; line < kLines; ++line) __builtin_prefetch(at -= 64, 0, 2);
    }
  }

  std::atomic<int> members_{0};
  alignas(64) mutable std::atomic<uint64_t> left_{0};
  alignas(64) mutable std::atomic<size_t> done_{0};
  alignas(64) mutable std::atomic<const uint8_t*> next_{nullptr};
  mutable std::atomic<const uint8_t*> next_end_{nullptr};
  mutable void (*piece_)(void*, size_t) = nullptr;
  mutable void* user_ = nullptr;
};

}  // namespace edgekit
