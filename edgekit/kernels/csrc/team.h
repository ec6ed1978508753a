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
    left_.close();
  }

  void run(size_t count, void (*piece)(void*, size_t), void* user) const override {
    piece_ = piece;
    user_ = user;
    done_.store(0, std::memory_order_relaxed);
    left_.reset(count);
    for (int64_t i = left_.take(true); i >= 0; i = left_.take(true)) {
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
  static constexpr int64_t kMostAhead = 1 << 19;  // what a second cache keeps
  static constexpr int kLines = 4;

  // The leader takes the first pieces, helpers the last, so that each finds what it fetched.
  void help() {
    const uint8_t *seen = nullptr, *begin = nullptr, *at = nullptr;
    for (int turns = 0;; ++turns) {
      if (left_.closed()) return;
      if (const int64_t i = left_.take(false); i >= 0) {
        piece_(user_, static_cast<size_t>(i));
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
  alignas(64) mutable Ends left_;
  alignas(64) mutable std::atomic<size_t> done_{0};
  alignas(64) mutable std::atomic<const uint8_t*> next_{nullptr};
  mutable std::atomic<const uint8_t*> next_end_{nullptr};
  mutable void (*piece_)(void*, size_t) = nullptr;
  mutable void* user_ = nullptr;
};

}  // namespace edgekit
